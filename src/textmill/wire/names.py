"""Where the service is found, and how large its messages may be: the same on both sides."""

from __future__ import annotations

from pathlib import Path

SERVICE = "textmill.v1.Engine"
MESSAGE_BYTES = 64 * 1024 * 1024  # a request's pictures take at most half of it
SIZE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)


def address(socket: Path) -> str:
    """gRPC's name for a Unix socket."""
    return f"unix:{socket.absolute()}"
