"""A real server on two ranks: it answers as one rank does, and outlives (as a group) the death of either."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import sized

if TYPE_CHECKING:
    from conftest import Server

PROMPT = [5, 17, 140, 3, 99]
FLAGS = ("--num-shard", "2", "--max-total-tokens", "512", "--max-concurrent-requests", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose text is words w0 .. w159, one token each."""
    folder = tmp_path_factory.mktemp("ranks") / "llama"
    sized("llama", eos_token_id=None)(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(160)}, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def body(tokens: int) -> dict[str, Any]:
    return {"inputs": " ".join(f"w{n}" for n in PROMPT), "parameters": {"max_new_tokens": tokens, "details": True}}


def chosen(server: Server, tokens: int = 16) -> list[int]:
    status, _, answer = server.post("/generate", body(tokens))
    assert status == 200, answer
    found: Any = answer
    return [token["id"] for token in found["details"]["tokens"]]


def descendants(server: Server, command: str) -> list[int]:
    """Processes of this server that run one textmill command, at any depth."""
    return [pid for pid in group(server.children("serve-engine")) if command in words(pid)]


def group(leaders: list[int]) -> Iterator[int]:
    """The processes of the engines' process groups."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) in leaders:
                yield int(entry.name)
        except ProcessLookupError:
            continue


def words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def wait_for(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


async def stream(server: Server, running: asyncio.Semaphore) -> list[dict[str, Any]]:
    """The events of a long generation; counts up when its first one is there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps(body(400)).encode()
    head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
    events = []
    while line := await reader.readline():
        if line.startswith(b"data:"):
            events.append(json.loads(line[5:]))
            if len(events) == 1:
                running.release()
    writer.close()
    return events


async def killed_under_load(server: Server, victim: int) -> list[list[dict[str, Any]]]:
    running = asyncio.Semaphore(0)
    streams = [asyncio.create_task(stream(server, running)) for _ in range(4)]
    for _ in streams:
        await asyncio.wait_for(running.acquire(), 30)
    os.kill(victim, signal.SIGKILL)
    return await asyncio.wait_for(asyncio.gather(*streams), 10)


def test_two_ranks_serve_and_die_as_one(launch: Callable[..., Server], folder: Path) -> None:
    server = launch("--model-id", str(folder), *FLAGS, "--engine-restarts", "1")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)[0, len(PROMPT) :].tolist()
    assert chosen(server) == expected
    [rank] = descendants(server, "serve-shard")
    engine = server.children("serve-engine")

    for events in asyncio.run(killed_under_load(server, rank)):
        assert events[-1]["error_type"] == "generation"
    wait_for(lambda: gone([rank, *engine]), 10)
    wait_for(lambda: server.status("/health") == 200)
    assert chosen(server) == expected
    assert f"rank 1 (process {rank}) was killed by SIGKILL; starting it again" in server.log.read_text()

    [rank] = descendants(server, "serve-shard")
    os.kill(rank, signal.SIGKILL)  # once more than allowed, and at rest
    wait_for(lambda: server.process.poll() is not None, 15)
    assert server.process.returncode == 1
    last = server.log.read_text().splitlines()[-1]
    assert last == f"Error: Shard failed: rank 1 (process {rank}) was killed by SIGKILL"


def test_ranks_die_with_the_launcher(launch: Callable[..., Server], folder: Path) -> None:
    server = launch("--model-id", str(folder), *FLAGS)
    everybody = [*server.children(), *descendants(server, "serve-shard")]
    server.process.kill()
    server.process.wait()
    wait_for(lambda: gone(everybody), 10)
