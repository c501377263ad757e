"""Fetching from a real server on this machine, whose address the tests declare public, and from what only claims so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from textmill.errors import InvalidRequest
from textmill.images.fetch import Fetcher

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


@asynccontextmanager
async def server(answer: bytes, *, pause: float = 0.0, repeat: int = 1) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answers every request with these bytes; what was asked is kept."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        try:
            for _ in range(repeat):
                writer.write(answer)
                await writer.drain()
                await asyncio.sleep(pause)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield f"pictures.example.org:{port}", asked
    finally:
        listening.close()


def fetcher(host: str, **options: Any) -> Fetcher:
    settings = {"most_bytes": 1000, "seconds": 2.0, "resolve": here, "is_public": lambda ip: True} | options
    return Fetcher(frozenset((host,)), settings.pop("most_bytes"), **settings)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\n\r\n",
    ],
)
async def test_a_named_host_is_asked(answer: bytes) -> None:
    async with server(answer) as (host, asked):
        assert await fetcher(host).fetch(f"http://{host}/a.png?b=1") == b"hello"
    assert asked[0].startswith(b"GET /a.png?b=1 HTTP/1.1\r\nHost: " + host.encode() + b"\r\n")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "answer was 302; redirects are not followed"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "the answer was 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", "Image size 1001 bytes exceeds maximum allowed size"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2000), "exceeds maximum allowed size of 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", "exceeds maximum allowed size"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "the answer is no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "the answer was cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", "the answer is compressed"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "the connection failed"),
        (bytes(100_000), "the connection failed"),
    ],
)  # fmt: skip
async def test_answers_that_are_no_picture(answer: bytes, words: str) -> None:
    async with server(answer) as (host, _):
        with pytest.raises(InvalidRequest, match=words):
            await fetcher(host).fetch(f"http://{host}/")


async def test_a_server_that_drips_is_left_in_time() -> None:
    async with server(b"x", pause=0.02, repeat=500) as (host, _):
        with pytest.raises(InvalidRequest, match=r"it took longer than 0\.2 s"):
            await fetcher(host, seconds=0.2).fetch(f"http://{host}/")


@pytest.mark.parametrize("found", [["10.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::1"], ["169.254.169.254"]])
async def test_a_host_with_any_private_address_is_not_connected_to(
    found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return found

    async def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    one = Fetcher(frozenset(("images.example.org",)), 1000, resolve=resolve)
    with pytest.raises(InvalidRequest, match="its host is in a private network"):
        await one.fetch("http://images.example.org/")
