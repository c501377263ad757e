"""Fetches a picture from a named host: resolved once, connected to just that address, no redirect followed.

The time limit holds from the first packet to the last, the size limit before anything is kept.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

from textmill.errors import InvalidRequest
from textmill.images.address import PORTS, Address, parsed, public, refusal, shortened
from textmill.images.limits import FETCH_SECONDS

Resolve = Callable[[str, int], Awaitable[list[str]]]
LONGEST_HEAD = 32 << 10
PIECE = 64 << 10


class Fetcher:
    """Bytes of pictures at `allowed` hosts, at most `most_bytes` each. `resolve` and `is_public` are for tests."""

    def __init__(
        self,
        allowed: frozenset[str],
        most_bytes: int,
        *,
        seconds: float = FETCH_SECONDS,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] = public,
    ) -> None:
        self._allowed = allowed
        self._most = most_bytes
        self._seconds = seconds
        self._resolve = resolve or resolved
        self._is_public = is_public

    async def fetch(self, url: str) -> bytes:
        """The body of an answer 200. Raises InvalidRequest for everything else."""
        address, shown = parsed(url, self._allowed), shortened(url)
        try:
            async with asyncio.timeout(self._seconds):
                ip = await self._one_address(address, shown)
                return await self._ask(address, ip, shown)
        except TimeoutError:
            raise refusal(shown, f"it took longer than {self._seconds:g} s") from None
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise refusal(shown, f"the connection failed ({type(error).__name__})") from None

    async def _one_address(self, address: Address, shown: str) -> str:
        """All addresses of the host must be public: what is checked here is what we connect to."""
        found = await self._resolve(address.host, address.port)
        if not found:
            raise refusal(shown, "its host has no address")
        if not all(self._is_public(ip) for ip in found):
            raise refusal(shown, "its host is in a private network")
        return found[0]

    async def _ask(self, address: Address, ip: str, shown: str) -> bytes:
        secure = ssl.create_default_context() if address.scheme == "https" else None
        name = address.host if secure else None
        reader, writer = await asyncio.open_connection(
            ip, address.port, ssl=secure, server_hostname=name, limit=LONGEST_HEAD
        )
        try:
            writer.write(request(address))
            await writer.drain()
            status, headers = head(await reader.readuntil(b"\r\n\r\n"))
            if status != 200:
                moved = "; redirects are not followed" if 300 <= status < 400 else ""
                raise refusal(shown, f"the answer was {status}{moved}")
            if headers.get("content-encoding", "identity") != "identity":
                raise refusal(shown, "the answer is compressed")
            return await self._body(reader, headers, shown)
        finally:
            writer.transport.abort()

    async def _body(self, reader: asyncio.StreamReader, headers: dict[str, str], shown: str) -> bytes:
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._most:
            raise self._too_large(int(declared), shown)
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return await self._chunks(reader, shown)
        wanted = int(declared) if declared.isdigit() else None
        body = b""
        while wanted is None or len(body) < wanted:
            piece = await reader.read(PIECE)
            if not piece:
                break
            body += piece
            if len(body) > self._most:
                raise self._too_large(len(body), shown)
        if wanted is not None and len(body) < wanted:
            raise refusal(shown, "the answer was cut off")
        return body

    async def _chunks(self, reader: asyncio.StreamReader, shown: str) -> bytes:
        body = b""
        while True:
            line = (await reader.readuntil(b"\r\n")).split(b";")[0].strip()
            try:
                size = int(line, 16)
            except ValueError:
                raise refusal(shown, "the answer is no HTTP") from None
            if size < 0 or len(body) + size > self._most:
                raise self._too_large(len(body) + size, shown)
            if not size:
                return body
            body += (await reader.readexactly(size + 2))[:-2]

    def _too_large(self, size: int, shown: str) -> InvalidRequest:
        most = self._most
        return InvalidRequest(f"Image size {size} bytes exceeds maximum allowed size of {most} bytes: {shown}")


async def resolved(host: str, port: int) -> list[str]:
    """Every IP address of a host, in the resolver's order."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def request(address: Address) -> bytes:
    plain = PORTS[address.scheme] == address.port
    host = address.host if plain else f"{address.host}:{address.port}"
    lines = (
        f"GET {address.target} HTTP/1.1",
        f"Host: {host}",
        "User-Agent: textmill",
        "Accept: image/png, image/jpeg, image/webp, image/gif",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def head(data: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer; OSError if it is none."""
    first, *rest = data.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise OSError("no HTTP answer")
    pairs = (line.split(":", 1) for line in rest if ":" in line)
    return int(words[1]), {name.strip().lower(): value.strip() for name, value in pairs}
