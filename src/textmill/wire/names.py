"""What the service is called, and how large its messages may be: the same on both sides."""

from __future__ import annotations

SERVICE = "textmill.v1.Engine"
MESSAGE_BYTES = 64 * 1024 * 1024  # a request's pictures take at most half of it


def method(name: str) -> str:
    """The path of one of the service's methods."""
    return f"/{SERVICE}/{name}"
