"""A real server under faults and abuse: nothing accepted is lost, nobody else is disturbed, blocks come back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Server

LONG = {"inputs": "Tell me a long story.", "parameters": {"max_new_tokens": 400, "ignore_eos_token": True}}


def head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()


async def opened(server: Server, body: dict[str, Any], path: str = "/generate_stream") -> tuple[Any, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    payload = json.dumps(body).encode()
    writer.write(head(path, len(payload)) + payload)
    await writer.drain()
    return reader, writer


async def first_token(reader: asyncio.StreamReader) -> None:
    while line := await reader.readline():
        if line.startswith(b"data:"):
            return
    raise AssertionError("the stream ended before its first token")


async def rest(reader: asyncio.StreamReader) -> list[dict[str, Any]]:
    lines = (await reader.read()).split(b"\n")
    return [json.loads(line[5:]) for line in lines if line.startswith(b"data:")]


async def answer(server: Server, body: dict[str, Any]) -> tuple[int, str]:
    reader, writer = await opened(server, body, "/generate")
    text = (await reader.read()).decode()
    writer.close()
    return int(text.split(" ", 2)[1]), text.rpartition("\r\n\r\n")[2]


def ledger(server: Server) -> dict[str, float]:
    states = ("accepted", "completed", "failed", "cancelled", "rejected")
    return {state: server.metric(f'textmill_ledger_requests{{state="{state}"}}') for state in states}


def balanced(server: Server) -> bool:
    counts = ledger(server)
    return counts["accepted"] == counts["completed"] + counts["failed"] + counts["cancelled"]


async def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


async def sixteen(server: Server) -> list[tuple[Any, Any]]:
    streams = [await opened(server, LONG) for _ in range(16)]
    await asyncio.gather(*(first_token(reader) for reader, _ in streams))
    return streams


async def test_a_killed_engine_ends_every_stream_with_an_error_and_comes_back(launch: Callable[..., Server]) -> None:
    server = launch("--engine-restarts", "1")
    streams = await sixteen(server)
    [engine] = server.children("serve-engine")
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    for reader, writer in streams:
        last = (await asyncio.wait_for(rest(reader), 5))[-1]
        assert last["error_type"] == "generation"
        assert "engine" in last["error"]
        writer.close()
    assert time.monotonic() - killed < 5
    await wait_for(lambda: server.status("/health") == 200)
    status, _, body = server.post(
        "/generate", {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 2}}
    )
    assert (status, body) == (200, {"generated_text": " Paris."})
    assert ledger(server) == {"accepted": 17, "completed": 1, "failed": 16, "cancelled": 0, "rejected": 0}
    os.kill(server.children("serve-engine")[0], signal.SIGKILL)  # once more than allowed
    await wait_for(lambda: server.process.poll() is not None)
    assert server.process.returncode not in (0, None)
    assert "Shard failed" in server.log.read_text().splitlines()[-1]


async def test_disconnected_clients_give_their_blocks_back(launch: Callable[..., Server]) -> None:
    server = launch()
    before = server.metric("textmill_kv_blocks_used")
    streams = await sixteen(server)
    for _, writer in streams[::2]:
        writer.transport.abort()
    await wait_for(lambda: ledger(server)["cancelled"] == 8, 5)
    for reader, writer in streams[1::2]:
        assert (await rest(reader))[-1]["generated_text"]
        writer.close()
    await wait_for(lambda: server.metric("textmill_kv_blocks_used") == before, 5)
    assert ledger(server) == {"accepted": 16, "completed": 8, "failed": 0, "cancelled": 8, "rejected": 0}


async def test_five_hundred_at_once(server: Server) -> None:
    before = ledger(server)
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 16}}
    answers = await asyncio.gather(*(answer(server, body) for _ in range(500)))
    served = [text for status, text in answers if status == 200]
    refused = [json.loads(text) for status, text in answers if status == 429]
    assert len(served) + len(refused) == 500
    assert len(served) >= 32
    assert len(set(served)) == 1
    assert all(r == {"error": "Model is overloaded", "error_type": "overloaded"} for r in refused)
    after = ledger(server)
    assert after["completed"] - before["completed"] == len(served)
    assert after["rejected"] - before["rejected"] == len(refused)
    assert balanced(server)


BAD = {
    "ten megabytes": (b'{"inputs": "' + b"a" * 10_000_000 + b'"}', 413, "length limit exceeded"),
    "broken JSON": (b'{"inputs": "a"', 400, "Failed to parse the request body as JSON"),
    "deep JSON": (b"[" * 100_000, 400, "Failed to parse the request body as JSON"),
    "wrong type": (b'{"inputs": 5}', 422, "Failed to deserialize the JSON body into the target type"),
    "wrong value": (
        b'{"inputs": "a", "parameters": {"temperature": 0}}',
        422,
        "Input validation error: `temperature` must be strictly positive",
    ),
    "too long": (
        json.dumps({"inputs": "word " * 9000, "parameters": {"max_new_tokens": 5}}).encode(),
        422,
        "`inputs` tokens + `max_new_tokens` must be <=",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_bodies_disturb_nobody(server: Server, name: str) -> None:
    payload, status, message = BAD[name]
    beside = {"inputs": LONG["inputs"], "parameters": {"max_new_tokens": 200, "ignore_eos_token": True}}
    golden = server.post("/generate", beside)[2]
    assert isinstance(golden, dict)
    reader, writer = await opened(server, beside)
    await first_token(reader)
    bad_reader, bad_writer = await asyncio.open_connection("127.0.0.1", server.port)
    bad_writer.write(head("/generate", len(payload)) + payload)
    text = (await asyncio.wait_for(bad_reader.read(), 20)).decode()
    bad_writer.close()
    assert int(text.split(" ", 2)[1]) == status, text[:300]
    assert message in text
    assert (await rest(reader))[-1]["generated_text"] == golden["generated_text"]
    writer.close()


async def test_sigterm_lets_streams_finish_and_leaves_nothing(launch: Callable[..., Server]) -> None:
    server = launch("--graceful-termination-timeout", "30")
    reader, writer = await opened(
        server, {"inputs": "Hi", "parameters": {"max_new_tokens": 150, "ignore_eos_token": True}}
    )
    await first_token(reader)
    children = server.children()
    server.process.send_signal(signal.SIGTERM)
    assert (await rest(reader))[-1]["generated_text"] is not None
    writer.close()
    await wait_for(lambda: server.process.poll() is not None)
    assert server.process.returncode == 0
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


async def test_sigterm_ends_what_takes_too_long_with_a_last_event(launch: Callable[..., Server]) -> None:
    server = launch("--graceful-termination-timeout", "1")
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 4000, "ignore_eos_token": True}}
    reader, writer = await opened(server, body)
    await first_token(reader)
    server.process.send_signal(signal.SIGTERM)
    last = (await asyncio.wait_for(rest(reader), 15))[-1]
    assert "error" in last, last
    writer.close()
    await wait_for(lambda: server.process.poll() is not None)


async def test_a_killed_launcher_takes_its_children_along(launch: Callable[..., Server]) -> None:
    server = launch()
    children = server.children()
    assert len(children) >= 2
    server.process.kill()
    server.process.wait()
    await wait_for(lambda: not [pid for pid in children if os.path.exists(f"/proc/{pid}")], 10)
    assert server.status("/health") == 0


async def test_two_routers_share_port_permits_and_metrics(launch: Callable[..., Server]) -> None:
    server = launch("--router-workers", "2", "--max-concurrent-requests", "4")
    assert len(server.children("router")) == 2
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 30}}
    answers = await asyncio.gather(*(answer(server, body) for _ in range(40)))
    counts = ledger(server)
    assert counts["completed"] == sum(status == 200 for status, _ in answers) >= 4
    assert counts["rejected"] == sum(status == 429 for status, _ in answers) > 0
    assert balanced(server)
