"""Requests over a real socket: tokens come, cancellations go, and no way of dying loses a request silently."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from scripted import ScriptedRunner, expected
from scripted_server import LIMITS, info

from textmill.core import Emission, Finish, Request, Sampling
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings
from textmill.errors import GenerationFailed, TextmillError, Unhealthy
from textmill.wire import engine_pb2 as pb
from textmill.wire.client import EngineClient, Inbox
from textmill.wire.convert import submit_from_request
from textmill.wire.names import SERVICE, address
from textmill.wire.server import run_engine_server


class Served:
    """A server in this process, with its engine in reach."""

    def __init__(self, engine: Engine, runner: ScriptedRunner, socket: Path, stop: asyncio.Event) -> None:
        self.engine, self.runner, self.socket, self.stop = engine, runner, socket, stop
        self.task: asyncio.Task[None] | None = None

    async def rests(self) -> None:
        """Wait until nothing is live; then the books must balance and no block be held."""
        for _ in range(500):
            if not self.engine.health().working and self.engine.stats()["running"] == 0:
                break
            await asyncio.sleep(0.01)
        ledger, stats = self.engine.ledger(), self.engine.stats()
        assert ledger.balances
        assert ledger.live == 0
        assert stats["kv_blocks_used"] == 0


@asynccontextmanager
async def served(
    folder: Path, seconds: float = 0.0, settings: EngineSettings | None = None, drain_seconds: float = 5.0
) -> AsyncIterator[Served]:
    runner = ScriptedRunner(LIMITS, seconds)
    server = Served(Engine(runner, settings), runner, folder / "engine.sock", asyncio.Event())
    ready = asyncio.Event()
    run = run_engine_server(server.engine, info(), server.socket, ready.set, server.stop, drain_seconds=drain_seconds)
    server.task = asyncio.create_task(run)
    await asyncio.wait_for(ready.wait(), 5)
    try:
        yield server
    finally:
        server.stop.set()
        await asyncio.wait_for(asyncio.wait([server.task]), 15)


@asynccontextmanager
async def connected(socket: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(socket)
    await client.connect(timeout=10)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path / "engine.sock")
    yield processes
    for process in processes.started:
        process.kill()
        process.wait()


class Processes:
    """Engine processes on one socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.started: list[subprocess.Popen[str]] = []

    def start(self, seconds: float = 0.005) -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("scripted_server.py"))
        command = [sys.executable, script, str(self.socket), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        return process


def request(seed: int = 0, new: int = 20, length: int = 10, **more: object) -> Request:
    tokens = tuple((seed * 31 + i * i) % LIMITS.vocab_size for i in range(length))
    return Request(id=0, tokens=tokens, max_new_tokens=new, **more)  # type: ignore[arg-type]


def answer(asked: Request) -> list[int]:
    return expected(asked, LIMITS.vocab_size, LIMITS.max_total_tokens)


async def collect(client: EngineClient, asked: Request) -> tuple[list[int], Emission]:
    """All tokens and the last emission."""
    tokens: list[int] = []
    last = Emission(0)
    async for last in client.generate(asked):
        tokens += [token.id for token in last.tokens]
    return tokens, last


async def test_one_request_and_the_questions(tmp_path: Path) -> None:
    async with served(tmp_path) as server, connected(server.socket) as client:
        asked = request(1)
        tokens, last = await collect(client, asked)
        assert tokens == answer(asked)
        assert last.finish is Finish.LENGTH
        assert await client.info() == info()
        health = await client.health()
        assert health.step >= 20
        assert not health.working
        stats = await client.stats()
        assert stats["requests_completed"] == 1
        assert stats["generated_tokens"] == 20


async def test_first_emission_brings_prompt_logprobs_queue_time_and_cached_tokens(tmp_path: Path) -> None:
    async with served(tmp_path) as server, connected(server.socket) as client:
        asked = request(2, length=40, prompt_logprobs=True)
        emissions = [emission async for emission in client.generate(asked)]
        first = emissions[0].prompt_logprobs
        assert first is not None
        assert first[0] != first[0]
        assert list(first[1:]) == [-float(token) for token in asked.tokens[1:]]
        assert emissions[0].queue_ns > 0
        assert all(later.prompt_logprobs is None and later.queue_ns == 0 for later in emissions[1:])
        again = [emission async for emission in client.generate(request(2, length=40))]
        assert again[0].cached_tokens == 32


async def test_leaving_a_generator_cancels_at_the_engine(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.002) as server, connected(server.socket) as client:
        stream = client.generate(request(3, new=900))
        async for _ in stream:
            break
        await stream.aclose()
        left_at = server.engine.health().step
        await server.rests()
        assert server.engine.ledger().cancelled == 1
        assert server.engine.health().step - left_at < 20


async def test_cancelled_task_cancels_at_the_engine(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.002) as server, connected(server.socket) as client:
        tasks = [asyncio.create_task(collect(client, request(i, new=900))) for i in range(8)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await server.rests()
        assert server.engine.ledger().cancelled == 8


async def test_five_hundred_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as server, connected(server.socket) as client:
        asked = [request(i, new=5) for i in range(500)]
        results = await asyncio.gather(*[collect(client, one) for one in asked])
        assert [tokens for tokens, _ in results] == [answer(one) for one in asked]
        await server.rests()
        assert server.engine.ledger().completed == 500


async def test_slow_reader_loses_nothing_and_holds_up_nobody(tmp_path: Path) -> None:
    async with served(tmp_path) as server, connected(server.socket) as client:
        slow = client.generate(request(4, new=200))
        tokens = [token.id for token in (await anext(slow)).tokens]
        for i in range(5):
            fast = request(10 + i)
            assert (await collect(client, fast))[0] == answer(fast)
        async for emission in slow:
            tokens += [token.id for token in emission.tokens]
        assert tokens == answer(request(4, new=200))


async def test_two_routers_use_the_same_ids(tmp_path: Path) -> None:
    async with (
        served(tmp_path, seconds=0.001) as server,
        connected(server.socket) as one,
        connected(server.socket) as other,
    ):
        first, second = request(5, new=50), request(6, new=50)
        results = await asyncio.gather(collect(one, first), collect(other, second))
        assert [tokens for tokens, _ in results] == [answer(first), answer(second)]


async def test_closing_a_client_cancels_its_requests_only(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.002) as server, connected(server.socket) as stays:
        async with connected(server.socket) as leaves:
            leaving = [asyncio.create_task(collect(leaves, request(i, new=900))) for i in range(4)]
            staying = asyncio.create_task(collect(stays, request(7, new=100)))
            await asyncio.sleep(0.1)
        results = await asyncio.gather(*leaving, return_exceptions=True)
        assert all(isinstance(result, GenerationFailed) for result in results)
        assert (await staying)[0] == answer(request(7, new=100))
        await server.rests()
        assert server.engine.ledger().cancelled == 4


BAD = {
    "no tokens": Request(0, (), 5),
    "exceed": Request(0, (1,) * LIMITS.max_total_tokens, 5),
    "vocabulary": Request(0, (1, LIMITS.vocab_size), 5),
    "max_new_tokens": Request(0, (1,), 0),
    "temperature": Request(0, (1,), 5, Sampling(temperature=float("nan"))),
    "top_p": Request(0, (1,), 5, Sampling(top_p=float("inf"))),
    "repetition_penalty": Request(0, (1,), 5, Sampling(repetition_penalty=float("inf"))),
    "frequency_penalty": Request(0, (1,), 5, Sampling(frequency_penalty=float("nan"))),
}


@pytest.mark.parametrize("reason", BAD)
async def test_bad_requests_fail_alone(tmp_path: Path, reason: str) -> None:
    async with served(tmp_path) as server, connected(server.socket) as client:
        good = request(8)
        (tokens, _), (none, last) = await asyncio.gather(collect(client, good), collect(client, BAD[reason]))
        assert tokens == answer(good)
        assert none == []
        assert last.finish is Finish.FAILED
        assert reason in last.error
        await server.rests()


@asynccontextmanager
async def raw_stream(socket: Path) -> AsyncIterator[grpc.aio.StreamStreamCall[pb.RouterMessage, pb.StepBatch]]:
    """What a router that is not ours could do."""
    async with grpc.aio.insecure_channel(address(socket)) as channel:
        yield channel.stream_stream(
            f"/{SERVICE}/Serve",
            request_serializer=pb.RouterMessage.SerializeToString,
            response_deserializer=pb.StepBatch.FromString,
        )()


async def test_duplicate_id_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.002) as server, raw_stream(server.socket) as stream:
        submit = submit_from_request(request(9, new=30))
        await stream.write(pb.RouterMessage(submits=[submit, submit]))
        finishes: list[int] = []
        errors: list[str] = []
        while len([finish for finish in finishes if finish]) < 2:
            batch = await stream.read()
            finishes += batch.finish
            errors += [extra.error for extra in batch.extras if extra.error]
        assert sorted(finish for finish in finishes if finish) == [Finish.LENGTH, Finish.FAILED]
        assert errors == ["the id 0 is in use"]
        assert len(finishes) == 31


async def test_at_most_one_message_per_step(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.002) as server, raw_stream(server.socket) as stream:
        submits = [submit_from_request(request(i, new=20)) for i in range(16)]
        for i, submit in enumerate(submits):
            submit.id = i
        await stream.write(pb.RouterMessage(submits=submits))
        rows = messages = 0
        while rows < 16 * 20:
            rows += len((await stream.read()).ids)
            messages += 1
        assert messages <= server.engine.health().step <= 22


async def test_failing_step_fails_its_requests_and_the_engine_goes_on(tmp_path: Path) -> None:
    async with served(tmp_path) as server, connected(server.socket) as client:

        def break_third(step: object) -> None:
            if len(server.runner.steps) == 3:
                raise RuntimeError("boom")

        server.runner.script = break_third  # type: ignore[assignment]
        _, last = await collect(client, request(1))
        assert last.finish is Finish.FAILED
        assert "boom" in last.error
        asked = request(2)
        assert (await collect(client, asked))[0] == answer(asked)
        await server.rests()


async def test_dead_runner_ends_the_server_and_every_request(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.002) as server, connected(server.socket) as client:
        tasks = [asyncio.create_task(collect(client, request(i, new=900))) for i in range(4)]
        await asyncio.sleep(0.05)

        def die(step: object) -> None:
            server.runner.alive = False
            raise RuntimeError("the worker is gone")

        server.runner.script = die  # type: ignore[assignment]
        results = await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert all(last.finish is Finish.FAILED for _, last in results)
        assert server.task is not None
        with pytest.raises(TextmillError, match="the worker is gone"):
            await asyncio.wait_for(server.task, 10)
        assert server.engine.ledger().balances


async def test_draining_refuses_the_new_and_finishes_the_old(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.005) as server, connected(server.socket) as client:
        old = asyncio.create_task(collect(client, request(1, new=60)))
        await asyncio.sleep(0.05)
        server.stop.set()
        await asyncio.sleep(0.02)
        assert (await client.health()).draining
        _, last = await collect(client, request(2))
        assert (last.finish, last.error) == (Finish.FAILED, "draining")
        assert (await old)[0] == answer(request(1, new=60))
        assert server.task is not None
        await asyncio.wait_for(server.task, 10)
        assert not server.socket.exists()
        assert server.runner.closed


async def test_drain_that_takes_too_long_ends_the_rest_with_a_reason(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.01, drain_seconds=0.05) as server, connected(server.socket) as client:
        old = asyncio.create_task(collect(client, request(1, new=1000)))
        await asyncio.sleep(0.05)
        server.stop.set()
        tokens, last = await asyncio.wait_for(old, 5)
        assert last.finish is Finish.FAILED
        assert "stopped" in last.error
        assert tokens == answer(request(1, new=1000))[: len(tokens)]


async def test_killed_engine_fails_everything_and_its_successor_serves(processes: Processes) -> None:
    first = processes.start()
    async with connected(processes.socket) as client:
        tasks = [asyncio.create_task(collect(client, request(i, new=900))) for i in range(16)]
        await asyncio.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert time.monotonic() - killed_at < 1
        assert all(isinstance(result, GenerationFailed) for result in results)
        assert not client.connected
        with pytest.raises(Unhealthy):
            await collect(client, request(1))
        with pytest.raises(Unhealthy):
            await client.health()
        processes.start()
        await client.connect(timeout=5)
        asked = request(2)
        assert (await collect(client, asked))[0] == answer(asked)


async def test_killed_router_leaves_nothing_behind(processes: Processes, tmp_path: Path) -> None:
    """The other way round: a client process dies, the engine notices by itself."""
    async with served(tmp_path, seconds=0.002) as server:
        script = (
            "import asyncio, sys\n"
            "from pathlib import Path\n"
            "from textmill.core import Request\n"
            "from textmill.wire.client import EngineClient\n"
            "async def main():\n"
            "    client = EngineClient(Path(sys.argv[1])); await client.connect()\n"
            "    async for _ in client.generate(Request(0, (1, 2, 3), 1000)):\n"
            "        print('token', flush=True)\n"
            "asyncio.run(main())\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(server.socket)], stdout=subprocess.PIPE)
        processes.started.append(process)  # type: ignore[arg-type]
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"token\n"
        process.kill()
        await server.rests()
        assert server.engine.ledger().cancelled == 1
        process.stdout.close()


async def test_no_engine_is_unhealthy(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "nothing.sock")
    with pytest.raises(Unhealthy):
        await client.connect(timeout=0.2)
    assert not client.connected


async def test_connecting_before_the_engine_is_there(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "engine.sock")
    connecting = asyncio.create_task(client.connect(timeout=10))
    await asyncio.sleep(0.2)
    async with served(tmp_path):
        await connecting
        assert (await collect(client, request(1)))[0] == answer(request(1))
        await client.close()


def test_client_imports_no_torch() -> None:
    script = "import textmill.wire.client, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


async def test_take_is_offered_what_somebody_waits_for() -> None:
    offered: list[int] = []

    def take(emission: Emission) -> bool:
        offered.append(emission.request_id)
        if emission.request_id == 9:
            raise ValueError("boom")
        return emission.request_id % 2 == 0

    inbox = Inbox(take)
    inbox.put(Emission(0))  # nobody waits yet
    assert (await inbox.get()).request_id == 0
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    for id_ in (2, 4, 5, 6):
        inbox.put(Emission(id_))
    assert offered == [2, 4, 5]  # behind one that was not taken the others queue up
    assert (await waiting).request_id == 5
    assert (await inbox.get()).request_id == 6
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(Emission(9))
    with pytest.raises(ValueError, match="boom"):
        await waiting


async def test_emissions_are_taken_over_the_wire_in_order(tmp_path: Path) -> None:
    async with served(tmp_path, seconds=0.001) as server, connected(server.socket) as client:
        asked, tokens, last = request(3, new=60), [], None

        def take(emission: Emission) -> bool:
            if emission.finish or len(tokens) % 5 == 4:
                return False
            tokens.extend(one.id for one in emission.tokens)
            return True

        async for last in client.generate(asked, take):
            tokens.extend(one.id for one in last.tokens)
        assert tokens == answer(asked)
        assert last is not None
        assert last.finish is Finish.LENGTH
        await server.rests()
