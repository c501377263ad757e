"""Router processes before an engine process, over the real wire: start, share, drain, and outlive an engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import events, write_tokenizer

from textmill.cli.permits import fill_permits

HERE = Path(__file__).parent
LONG = {"inputs": "a", "parameters": {"max_new_tokens": 900, "ignore_eos_token": True}}


async def spawn(name: str, *arguments: object, fds: tuple[int, ...] = ()) -> asyncio.subprocess.Process:
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, pass_fds=fds)


async def said(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()


@dataclass
class House:
    """An engine and routers on one port."""

    place: Path
    seconds: float = 0.002
    grace: int = 5
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = write_tokenizer(self.place)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.permits = fill_permits(16)
        self.socket = self.place / "engine"
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.listener.getsockname()[1]}", timeout=20)

    async def engine(self) -> asyncio.subprocess.Process:
        self.processes.append(await spawn("engine_child.py", self.socket, self.seconds))
        return self.processes[-1]

    async def router(self, index: int = 0, workers: int = 1) -> asyncio.subprocess.Process:
        fds = (self.listener.fileno(), self.permits)
        child = await spawn("router_child.py", self.model, self.socket, *fds, index, workers, self.grace, fds=fds)
        self.processes.append(child)
        return child

    async def close(self) -> None:
        await self.client.aclose()
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        self.listener.close()
        os.close(self.permits)

    async def metric(self, name: str) -> float:
        lines = (await self.client.get("/metrics")).text.splitlines()
        [value] = [line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == name]
        return float(value)

    async def ledger(self) -> dict[str, float]:
        states = ("accepted", "completed", "failed", "cancelled", "rejected")
        return {one: await self.metric(f'textmill_ledger_requests{{state="{one}"}}') for one in states}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path)
    yield made
    await made.close()


async def streamed(house: House, body: dict[str, Any], started: asyncio.Event | None = None) -> list[Any]:
    text = ""
    async with house.client.stream("POST", "/generate_stream", json=body) as answer:
        async for part in answer.aiter_text():
            text += part
            if started is not None:
                started.set()
    return events(text)


async def test_a_router_waits_for_its_engine_serves_and_drains(house: House) -> None:
    router = await house.router()
    await asyncio.sleep(0.5)
    await house.engine()
    began = time.perf_counter()
    assert await said(router) == "ready"
    assert time.perf_counter() - began < 10
    assert (await house.client.get("/health")).status_code == 200
    assert (await house.client.get("/info")).json()["max_total_tokens"] == 1024
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 20, "details": True, "ignore_eos_token": True}}
    whole = (await house.client.post("/generate", json=body)).json()
    assert whole["details"]["generated_tokens"] == 20
    found = await streamed(house, body)
    assert [one["token"] for one in found] == whole["details"]["tokens"]
    started = asyncio.Event()
    open_stream = asyncio.create_task(streamed(house, LONG, started))
    await started.wait()
    router.send_signal(signal.SIGTERM)
    assert (await open_stream)[-1]["generated_text"]
    assert await said(router) == "False"  # torch was never imported
    assert await asyncio.wait_for(router.wait(), 5) == 0
    assert not (house.place / "engine.router-0").exists()


async def test_what_takes_too_long_is_ended_with_last_words(house: House) -> None:
    house.grace, house.seconds = 0, 0.05
    await house.engine()
    router = await house.router()
    await said(router)
    started = asyncio.Event()
    open_stream = asyncio.create_task(streamed(house, LONG, started))
    await started.wait()
    router.send_signal(signal.SIGTERM)
    assert (await open_stream)[-1]["error_type"] == "draining"
    assert await asyncio.wait_for(router.wait(), 5) == 0


async def test_a_killed_engine_ends_streams_and_comes_back(house: House) -> None:
    engine = await house.engine()
    await said(await house.router())
    started = [asyncio.Event() for _ in range(16)]
    streams = [asyncio.create_task(streamed(house, LONG, one)) for one in started]
    await asyncio.gather(*(one.wait() for one in started))
    engine.kill()
    async with asyncio.timeout(5):
        for one in streams:
            last = (await one)[-1]
            assert last["error_type"] == "generation"
            assert "engine" in last["error"]
    assert (await house.client.get("/health")).status_code == 503
    refused = await house.client.post("/generate", json=LONG)
    assert (refused.status_code, refused.json()["error_type"]) == (503, "healthcheck")
    await said(await house.engine())
    async with asyncio.timeout(10):
        while (await house.client.get("/health")).status_code != 200:
            await asyncio.sleep(0.05)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 5}}
    assert (await house.client.post("/generate", json=body)).status_code == 200
    assert await house.ledger() == {"accepted": 17, "completed": 1, "failed": 16, "cancelled": 0, "rejected": 1}
    assert await house.metric("textmill_ledger_open") == 0


async def test_two_routers_share_port_permits_and_figures(house: House) -> None:
    house.seconds = 0.01
    await house.engine()
    for router in [await house.router(index, 2) for index in (0, 1)]:
        await said(router)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 20, "ignore_eos_token": True}}
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=house.client.base_url, timeout=20, limits=limits) as client:
        answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(60)))
    served = sum(one.status_code == 200 for one in answers)
    refused = sum(one.status_code == 429 for one in answers)
    assert served + refused == 60
    assert served >= 16
    counts = await house.ledger()
    assert (counts["accepted"], counts["completed"], counts["rejected"]) == (served, served, refused)
    assert await house.metric("tgi_request_count") == 60
    assert len(os.read(house.permits, 100)) == 16


async def test_disconnected_clients_stop_the_engines_work(house: House) -> None:
    house.seconds = 0.01
    await house.engine()
    await said(await house.router())
    before = await house.metric("textmill_kv_blocks_used")
    started = [asyncio.Event() for _ in range(16)]
    streams = [asyncio.create_task(streamed(house, LONG, one)) for one in started]
    await asyncio.gather(*(one.wait() for one in started))
    for one in streams:
        one.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    async with asyncio.timeout(2):
        while await house.metric("textmill_engine_requests_live") or await house.metric("textmill_ledger_open"):
            await asyncio.sleep(0.02)
    assert await house.metric("textmill_kv_blocks_used") == before
    assert (await house.ledger())["cancelled"] == 16
