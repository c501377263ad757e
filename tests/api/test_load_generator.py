"""The benchmarks' load generator counts what a careful client would, however the bytes are cut."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "load.py"
EVENTS = (
    b'data: {"object":"text_completion","choices":[{"index":0,"text":"a \\"choices\\":[{ \\n","finish_reason":""}]}\n\n'
    b": keep-alive\n\n"
    b'data: {"choices": [{"text": "spaced"}]}\n\n'
    b'data: {"choices":[{"text":"\\"error\\""}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_generator", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def asked(load: ModuleType, parts: list[bytes]) -> object:
    """What the generator makes of these bytes, each part a packet of its own."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.001)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await load.ask(server.sockets[0].getsockname()[1], "a", 8, {})


def chunked(data: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\n\n\r\n" % (len(one) + 2, one) for one in data.split(b"\n\n") if one) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("coding", [bytes, chunked])
async def test_tokens_are_counted(load: ModuleType, size: int, coding: Callable[[bytes], bytes]) -> None:
    data = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + coding(EVENTS)
    answer = await asked(load, [data[at : at + size] for at in range(0, len(data), size)])
    assert len(answer.arrivals) == 3  # type: ignore[attr-defined]
    assert answer.error == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error":{"message":"bad"}}\n\n', '{"message": "bad"}'),
        (b"HTTP/1.1 429 Too Many\r\n\r\noverloaded", "429 Too Many\r\n\r\noverloaded"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "the stream carried no token"),
        (b"", "the stream carried no token"),
    ],
)
async def test_what_is_no_answer_is_an_error(load: ModuleType, data: bytes, error: str) -> None:
    assert error in (await asked(load, [data])).error  # type: ignore[attr-defined]
