"""The engine's thread: one step ahead, never spinning, never stopping for one request; the ledger always balances."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from scripted import ScriptedRunner, expected, limits

from textmill.core import Emission, Finish, Request, Step
from textmill.engine import engine as engine_module
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings

LIMITS = limits(num_blocks=128, max_slots=16)


class Listener:
    """A sink that remembers, and lets a test wait."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[Emission]]] = []
        self._changed = threading.Condition()

    def __call__(self, step: int, emissions: list[Emission]) -> None:
        with self._changed:
            self.batches.append((step, emissions))
            self._changed.notify_all()

    def of(self, id_: int) -> list[Emission]:
        with self._changed:
            return [emission for _, batch in self.batches for emission in batch if emission.request_id == id_]

    def tokens(self, id_: int) -> list[int]:
        return [token.id for emission in self.of(id_) for token in emission.tokens]

    def finish(self, id_: int) -> Finish:
        emissions = self.of(id_)
        return emissions[-1].finish if emissions else Finish.NONE

    def wait(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            with self._changed:
                self._changed.wait(0.05)


@contextmanager
def running(runner: ScriptedRunner, settings: EngineSettings | None = None) -> Iterator[Engine]:
    engine = Engine(runner, settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert engine.ledger().balances
        assert engine.ledger().live == 0
        assert runner.closed


def request(id_: int, new: int = 20) -> Request:
    return Request(id_, tuple((id_ * 7 + i) % LIMITS.vocab_size for i in range(9)), new)


def answer(asked: Request) -> list[int]:
    return expected(asked, LIMITS.vocab_size, LIMITS.max_total_tokens)


@pytest.mark.parametrize("ahead", [0, 1])
def test_many_requests_from_many_threads(ahead: int) -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS), EngineSettings(steps_ahead=ahead)) as engine:
        threads = [
            threading.Thread(target=lambda n=n: [engine.submit(request(n * 20 + i), listener) for i in range(20)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or engine.health().working:
            assert engine.ledger().balances
        assert engine.wait_idle(10)
        assert all(listener.tokens(i) == answer(request(i)) for i in range(80))
        assert engine.ledger().completed == 80
        engine.check()
        assert engine.stats()["kv_blocks_used"] == 0


def test_next_step_is_launched_before_the_last_is_digested() -> None:
    runner = ScriptedRunner(LIMITS)
    launched: list[int] = []
    runner.script = lambda step: launched.append(runner.steps[-1].number - step.number)  # type: ignore[func-returns-value]
    listener = Listener()
    with running(runner) as engine:
        engine.submit(request(1, 10), listener)
        assert engine.wait_idle(10)
    assert launched == [1] * 9 + [0]


def test_one_batch_per_step_and_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FRAME_NS", 0)  # as if every step took longer
    one, other = Listener(), Listener()
    with running(ScriptedRunner(LIMITS, seconds=0.001)) as engine:
        for i in range(6):
            engine.submit(request(i), one if i % 2 else other)
        assert engine.wait_idle(10)
    for listener in (one, other):
        steps = [step for step, _ in listener.batches]
        assert len(steps) == len(set(steps))
        assert max(len(batch) for _, batch in listener.batches) == 3


def test_tokens_that_come_fast_leave_together_but_not_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FRAME_NS", 10**18)  # as if no time passed
    listener = Listener()
    with running(ScriptedRunner(LIMITS)) as engine:
        engine.submit(request(1, 40), listener)
        assert engine.wait_idle(10)
    assert listener.tokens(1) == answer(request(1, 40))
    sizes = [sum(len(emission.tokens) for emission in batch) for _, batch in listener.batches]
    assert sizes == [1, 38, 1]


def test_no_token_waits_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held leaves before a step that computes a prompt, however short the steps have been."""
    monkeypatch.setattr(engine_module, "FRAME_NS", 10**18)
    first, second = Listener(), Listener()
    runner = ScriptedRunner(LIMITS, seconds=0.001)
    waiting: list[tuple[int, int]] = []

    def look(step: Step) -> None:
        if step.admissions and step.number > 1:
            sampled = sum(work.samples for one in runner.steps[: step.number - 2] for work in one.work)
            waiting.append((sampled, len(first.tokens(1))))

    runner.script = look
    with running(runner) as engine:
        engine.submit(request(1, 100), first)
        first.wait(lambda: len(runner.steps) > 20)
        engine.submit(request(2, 2), second)
        assert engine.wait_idle(10)
    [(known, seen)] = waiting
    assert seen >= known > 15


@pytest.mark.parametrize("rest", [0.0, 0.002])
def test_first_tokens_leave_before_the_next_step_where_kernels_take_every_core(rest: float) -> None:
    listener, runner = Listener(), ScriptedRunner(LIMITS, eager=True)
    handed: list[int] = []  # tokens that had left when a step was launched
    runner.script = lambda step: handed.append(len(listener.tokens(1)))  # type: ignore[func-returns-value]
    with running(runner, EngineSettings(rest_seconds=rest)) as engine:
        engine.submit(request(1, 8), listener)
        assert engine.wait_idle(10)
    assert listener.tokens(1) == answer(request(1, 8))
    assert handed[:2] == [0, 1 if rest else 0]


def test_who_arrives_during_a_first_step_is_in_the_next() -> None:
    listener, runner = Listener(), ScriptedRunner(LIMITS)
    with running(runner, EngineSettings(rest_seconds=0.001)) as engine:

        def look(step: Step) -> None:
            if step.number == 1:
                engine.submit(request(2, 5), listener)

        runner.script = look
        engine.submit(request(1, 5), listener)
        assert engine.wait_idle(10)
    assert [len(step.admissions) for step in runner.steps[:2]] == [1, 1]
    assert [listener.tokens(i) for i in (1, 2)] == [answer(request(i, 5)) for i in (1, 2)]


def test_a_running_stream_does_not_rest_for_others_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: rests.append(seconds) if seconds == 0.5 else sleep(seconds))
    first, second = Listener(), Listener()
    submitted = threading.Event()

    def look(step: Step) -> None:
        if step.number == 10:
            assert submitted.wait(10)

    runner = ScriptedRunner(LIMITS)
    runner.script = look
    with running(runner, EngineSettings(rest_seconds=0.5)) as engine:
        engine.submit(request(1, 100), first)
        first.wait(lambda: len(runner.steps) > 5)
        engine.submit(request(2, 5), second)
        submitted.set()
        assert engine.wait_idle(10)
        assert rests == [0.5]
        engine.submit(request(3, 1), second)  # no step comes behind it
        assert engine.wait_idle(10)
    assert rests == [0.5]


def test_idle_engine_sleeps() -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS)) as engine:
        engine.submit(request(1), listener)
        assert engine.wait_idle(10)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_cancel_stops_within_two_steps_and_frees_blocks() -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS, seconds=0.005)) as engine:
        ticket = engine.submit(request(1, 200), listener)
        listener.wait(lambda: len(listener.tokens(1)) > 3)
        step = engine.health().step
        engine.cancel(ticket)
        engine.cancel(ticket)
        engine.cancel(999)
        listener.wait(lambda: listener.finish(1) is Finish.CANCELLED)
        assert engine.health().step <= step + 2
        listener.wait(lambda: engine.stats()["kv_blocks_used"] == 0)
        assert engine.ledger().cancelled == 1
        assert listener.tokens(1) == answer(request(1, 200))[: len(listener.tokens(1))]


def test_cancel_of_the_waiting() -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS, seconds=0.002), EngineSettings(max_batch_size=1)) as engine:
        engine.submit(request(1, 30), listener)
        waiting = engine.submit(request(2, 30), listener)
        engine.cancel(waiting)
        assert engine.wait_idle(10)
        assert listener.of(2) == [Emission(2, finish=Finish.CANCELLED)]
        assert listener.tokens(1) == answer(request(1, 30))


def test_impossible_requests_fail_at_once() -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS)) as engine:
        engine.submit(Request(1, (), 5), listener)
        engine.submit(Request(2, (1,) * 256, 5), listener)
        assert [emission.finish for emission in listener.of(1) + listener.of(2)] == [Finish.FAILED] * 2
        assert "256" in listener.of(2)[0].error
        assert engine.ledger().failed == 2


@pytest.mark.parametrize("where", ["collect", "submit"])
def test_broken_step_fails_its_own_requests_only(where: str) -> None:
    runner, listener = ScriptedRunner(LIMITS, seconds=0.001), Listener()

    def explode(step: Step) -> None:
        if runner.steps and step.number == 5:
            raise ValueError("boom")

    if where == "collect":
        runner.script = explode  # type: ignore[assignment]
    else:
        submit = runner.submit

        def exploding(step: Step) -> None:
            explode(step)
            submit(step)

        runner.submit = exploding  # type: ignore[method-assign]
    with running(runner, EngineSettings(max_batch_size=2)) as engine:
        for i in range(5):
            engine.submit(request(i), listener)
        assert engine.wait_idle(10)
        finishes = [listener.finish(i) for i in range(5)]
        assert finishes == [Finish.FAILED] * 2 + [Finish.LENGTH] * 3
        assert "boom" in listener.of(0)[-1].error
        assert engine.stats()["steps_failed"] == 1
        assert all(listener.tokens(i) == answer(request(i)) for i in range(2, 5))
        engine.check()


def test_dead_runner_fails_everything_and_says_so() -> None:
    runner, listener = ScriptedRunner(LIMITS), Listener()

    def die(step: Step) -> None:
        if step.number == 5:
            runner.alive = False
            raise OSError("gone")

    runner.script = die  # type: ignore[assignment]
    told: list[str] = []
    with running(runner, EngineSettings(max_batch_size=1)) as engine:
        engine.on_failure = told.append
        for i in range(3):
            engine.submit(request(i), listener)
        assert engine.wait_idle(10)
        listener.wait(lambda: bool(told))
        assert all(listener.finish(i) is Finish.FAILED for i in range(3))
        assert "gone" in engine.failure
        engine.submit(request(4), listener)
        assert listener.finish(4) is Finish.FAILED


def test_broken_sink_takes_only_its_own_requests_along() -> None:
    listener = Listener()

    def broken(step: int, emissions: list[Emission]) -> None:
        raise RuntimeError("the loop is closed")

    with running(ScriptedRunner(LIMITS, seconds=0.001)) as engine:
        engine.submit(request(1, 100), broken)
        engine.submit(request(2, 40), listener)
        assert engine.wait_idle(10)
        assert listener.tokens(2) == answer(request(2, 40))
        assert engine.ledger().cancelled == 1


def test_drain_refuses_the_new_and_finishes_the_old() -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS, seconds=0.002)) as engine:
        engine.submit(request(1), listener)
        engine.drain()
        engine.submit(request(2), listener)
        assert listener.of(2) == [Emission(2, finish=Finish.FAILED, error="draining")]
        assert engine.wait_idle(10)
        assert listener.tokens(1) == answer(request(1))
        assert engine.health().draining


def test_stop_fails_what_is_live() -> None:
    listener = Listener()
    with running(ScriptedRunner(LIMITS, seconds=0.005)) as engine:
        engine.submit(request(1, 200), listener)
        listener.wait(lambda: bool(listener.tokens(1)))
    assert listener.finish(1) is Finish.FAILED
    assert "stopped" in listener.of(1)[-1].error


def test_health_shows_a_step_that_hangs() -> None:
    hang, listener = threading.Event(), Listener()
    runner = ScriptedRunner(LIMITS)
    runner.script = lambda step: hang.wait(10) and None  # type: ignore[func-returns-value]
    with running(runner) as engine:
        time.sleep(0.1)
        engine.submit(request(1), listener)
        assert engine.health().step_age_ns < 0.1e9
        time.sleep(0.15)
        health = engine.health()
        assert health.working
        assert health.step_age_ns > 0.1e9
        runner.progress_ns = time.monotonic_ns()  # it is a long step, but it gets on
        assert engine.health().step_age_ns < 0.1e9
        hang.set()
        assert engine.wait_idle(10)
        assert not engine.health().working
        assert engine.health().step >= 20


def test_preemption_and_prefix_hits_show_in_the_stats() -> None:
    small = limits(num_blocks=16, max_slots=8, max_total_tokens=48)
    listener = Listener()
    with running(ScriptedRunner(small)) as engine:
        for i in range(12):
            engine.submit(request(i, 30), listener)
        assert engine.wait_idle(10)
        assert all(listener.tokens(i) == answer(request(i, 30)) for i in range(12))
        stats = engine.stats()
        assert stats["preemptions"] > 0
        assert stats["prefix_hit_tokens"] > 0
        assert stats["generated_tokens"] == 360
        assert stats["kv_blocks_total"] == 16
        assert stats["queue_size"] == stats["running"] == stats["batch_current_size"] == 0
        engine.check()
