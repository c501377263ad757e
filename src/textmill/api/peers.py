"""Routers on one port tell each other their figures over private Unix sockets, so that any one speaks for all."""

from __future__ import annotations

import asyncio
import json

import msgspec

from textmill.observe.metrics import Registry, Snapshot

PEER_TIMEOUT = 1.0
REQUEST = b"GET /internal/metrics HTTP/1.0\r\n\r\n"
ANSWER = b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n"


async def serve_snapshots(registry: Registry, path: str) -> asyncio.Server:
    """Answer /internal/metrics on a socket that only our own processes can reach."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(PEER_TIMEOUT):
                line = await reader.readline()
                if line.startswith(b"GET /internal/metrics "):
                    writer.write(ANSWER + msgspec.json.encode(registry.snapshot()))
                    await writer.drain()
        except (TimeoutError, OSError, ValueError):
            pass  # a peer that asks badly gets nothing
        finally:
            writer.close()

    return await asyncio.start_unix_server(answer, path)


async def peer_snapshot(path: str) -> Snapshot:
    """Another router's figures; none if it is not there."""
    try:
        async with asyncio.timeout(PEER_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(REQUEST)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (TimeoutError, OSError):
        return {}
    snapshot: Snapshot = json.loads(body) if b" 200 " in head.split(b"\r\n", 1)[0] else {}
    return snapshot
