"""Over a real socket: clients that leave, read slowly or send rubbish; drains; nothing accepted is ever lost."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

import pytest
from api_harness import Live, ScriptedEngine, events, until

from textmill.api import exchange as exchange_module
from textmill.api import sse as sse_module
from textmill.core import Emission, TokenChoice

LONG = "hello " * 30
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a"}),
    ("/generate", {"inputs": "a", "parameters": {"do_sample": True, "best_of": 3}}),
    ("/generate_stream", {"inputs": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2}),
    ("/v1/completions", {"prompt": ["a", "b"]}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_leaves_is_cancelled(
    live: Live, engine: ScriptedEngine, path: str, body: dict[str, Any], tokens: int, reset: bool
) -> None:
    """Before the first token or between tokens, streamed or not, by FIN or by RST."""
    engine.says(LONG)
    engine.gate = asyncio.Semaphore(0)
    _, writer = await live.post(path, body)
    await until(lambda: bool(engine.requests))
    sequences = len(engine.requests)
    for _ in range(tokens):
        engine.gate.release()
    await asyncio.sleep(0.01)
    if reset:
        writer.transport.abort()
    else:
        writer.close()
    await until(lambda: len(engine.cancelled) == sequences)
    await until(lambda: live.state.metrics.ledger.open == 0)
    assert live.state.metrics.ledger.count("cancelled") == sequences
    assert live.state.metrics.failures.values == {("dropped",): 2.0 if "prompt" in body else 1.0}


async def test_leaving_during_the_upload(live: Live, engine: ScriptedEngine) -> None:
    _, writer = await live.connect()
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
    await until(lambda: bool(live.state.open))
    writer.close()
    await until(lambda: not live.state.open)
    assert not engine.requests


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    text = (await asyncio.wait_for(reader.read(), 5)).decode()
    head, _, body = text.partition("\r\n\r\n")
    return int(head.split(" ")[1]), body


async def test_too_large_is_said_before_all_is_read(live: Live) -> None:
    reader, writer = await live.connect()
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head + b"content-length: 100000000\r\n\r\n" + b"a" * 1000)
    line = await asyncio.wait_for(reader.readline(), 1)  # we have sent a hundred-thousandth of it
    assert b" 413 " in line
    writer.close()


async def test_too_large_in_chunks(live: Live) -> None:
    reader, writer = await live.connect()
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
    writer.write(b"transfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b"a" * 4096 + b"\r\n")
    for _ in range(5):
        writer.write(b"1000\r\n" + b"a" * 4096 + b"\r\n")
    line = await asyncio.wait_for(reader.readline(), 1)
    assert b" 413 " in line
    writer.close()


async def test_a_ten_megabyte_body_gets_its_answer(live: Live) -> None:
    """A client that sends all before it reads must still be able to read the answer."""
    body = b'{"inputs": "' + b"a" * 10_000_000 + b'"}'
    reader, writer = await live.post("/generate", body)
    await asyncio.wait_for(writer.drain(), 5)
    status, text = await read_answer(reader)
    assert (status, text) == (413, "Failed to buffer the request body: length limit exceeded")
    writer.close()


async def test_endless_headers_are_cut(live: Live) -> None:
    reader, writer = await live.connect()
    writer.write(b"POST /generate HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"a" * 100) for n in range(650)))
    status, _ = await read_answer(reader)
    assert status == 400
    writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
    ],
)
async def test_rubbish_is_a_400(live: Live, head: bytes) -> None:
    reader, writer = await live.connect()
    writer.write(head)
    assert (await read_answer(reader))[0] == 400
    writer.close()


async def test_a_reader_that_stops_is_cut_off(
    live: Live, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exchange_module, "SEND_LIMIT", 0.2)
    wide = TokenChoice(engine.tokenizer.encode("hello", False).ids[0], -1.0, tuple((1, -1.0) for _ in range(2000)))
    engine.script = lambda request: [Emission(request.id, (wide,))] * 150  # about 20 MB of events
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", live.port))
    body = b'{"inputs": "a", "parameters": {"top_n_tokens": 5}}'
    head = b"POST /generate_stream HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    raw.sendall(head % len(body) + body)
    await until(lambda: bool(engine.cancelled))
    await until(lambda: not live.state.open)
    assert live.state.metrics.failures.values == {("dropped",): 1.0}
    raw.settimeout(2)
    received = b""
    while part := raw.recv(1 << 20):
        received += part
    assert not received.endswith(b"0\r\n\r\n")
    assert "without completing" not in caplog.text
    raw.close()


async def test_keep_alive_comments(live: Live, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse_module, "KEEP_ALIVE", 0.05)
    engine.gate = asyncio.Semaphore(0)
    reader, writer = await live.post("/generate_stream", {"inputs": "a"})
    await asyncio.wait_for(reader.readuntil(b":\n\n\r\n"), 2)
    for _ in range(3):
        engine.gate.release()
    await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 2)
    writer.close()


async def stream_text(reader: asyncio.StreamReader) -> str:
    """The payload of a chunked answer."""
    await reader.readuntil(b"\r\n\r\n")
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(parts).decode()


async def test_a_drain_lets_streams_finish(live: Live, engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Semaphore(1)
    reader, writer = await live.post("/generate_stream", {"inputs": "a"})
    await until(lambda: bool(engine.requests))
    idle, idle_writer = await live.connect()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: live.state.draining)
    assert await asyncio.wait_for(idle.read(), 2) == b""
    for _ in range(3):
        engine.gate.release()
    found = events(await asyncio.wait_for(stream_text(reader), 2))
    assert found[-1]["generated_text"] == "hello world"
    await asyncio.wait_for(asyncio.shield(live.task), 5)
    with pytest.raises(OSError, match="Connect"):
        await live.connect()
    writer.close()
    idle_writer.close()


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/v1/completions"])
async def test_a_drain_ends_what_takes_too_long(live: Live, engine: ScriptedEngine, path: str) -> None:
    object.__setattr__(live.state.settings, "graceful_termination_timeout", 0)
    engine.gate = asyncio.Semaphore(1)
    openai = {"prompt": "a", "stream": True}
    reader, writer = await live.post(path, openai if "v1" in path else {"inputs": "a"})
    await until(lambda: bool(engine.requests))
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: live.state.draining)
    os.kill(os.getpid(), signal.SIGTERM)
    text = (await asyncio.wait_for(reader.read(), 5)).decode()
    assert "The server is shutting down" in text
    assert ('"error_type":"draining"' in text) == ("v1" not in path)
    assert ("data: [DONE]" in text) == ("v1" in path)
    assert text.startswith("HTTP/1.1 200" if path != "/generate" else "HTTP/1.1 503")
    await until(lambda: len(engine.cancelled) == 1)
    writer.close()


async def test_many_streams_at_once(live: Live, engine: ScriptedEngine) -> None:
    """A burst of 40 against 8 permits: some are served in full, the rest refused, none lost."""
    engine.pace = 0.005

    async def one() -> list[Any]:
        reader, writer = await live.post("/generate_stream", {"inputs": "a"})
        found = events(await stream_text(reader))
        writer.close()
        return found

    answers = await asyncio.gather(*(one() for _ in range(40)))
    served = [one for one in answers if one[-1].get("generated_text") == "hello world"]
    refused = [one for one in answers if one == [{"error": "Model is overloaded", "error_type": "overloaded"}]]
    assert len(served) + len(refused) == 40
    assert len(served) >= 8
    assert live.state.metrics.ledger.count("completed") == len(served)
    assert live.state.metrics.ledger.count("rejected") == len(refused)
