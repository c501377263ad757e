"""Steps that follow each other natively: planned ahead, they bring what steps one by one bring; failures stay alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from textmill.config import Settings
from textmill.core import Admission, Sampling, SlotWork, Step, StepResult
from textmill.engine.runner import Runner
from textmill.kernels.dispatch import native_available
from textmill.runner.build import build_runner
from textmill.runner.native_runner import NativeRunner
from textmill.weights.source import resolve

pytestmark = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

PROMPTS = {0: tuple(range(5, 25)), 1: tuple(range(90, 101))}
SENSELESS = Sampling(do_sample=True, temperature=float("nan"))


@pytest.fixture
def runner(tiny_llama: Callable[..., Path]) -> Iterator[Runner]:
    settings = Settings(max_total_tokens=64, max_concurrent_requests=4, max_batch_total_tokens=512)
    built, _ = build_runner(settings, resolve(str(tiny_llama())), lambda *_, **__: None)
    yield built
    built.close()


def admit(slot: int, sampling: Sampling | None = None) -> Admission:
    return Admission(slot, PROMPTS[slot], sampling or Sampling(do_sample=True, temperature=0.8, seed=slot + 7))


def first_step(*admissions: Admission) -> Step:
    blocks = tuple((one.slot, 0, tuple(range(4 * one.slot, 4 * one.slot + 4))) for one in admissions)
    work = tuple(SlotWork(one.slot, 0, len(one.tokens), True) for one in admissions)
    return Step(1, work, admissions, (), blocks)


def next_step(number: int, *slots: int, first: int = 1) -> Step:
    """Decodes the slots, as if all steps since `first` had brought each a token."""
    return Step(number, tuple(SlotWork(slot, len(PROMPTS[slot]) + number - first - 1, 1, True) for slot in slots))


def tokens_of(result: StepResult) -> list[int | None]:
    return [sampled.token.id if sampled.token else None for sampled in result.sampled]


def one_by_one(runner: Runner, steps: list[Step]) -> list[StepResult]:
    out = []
    for step in steps:
        runner.submit(step)
        out.append(runner.collect())
    return out


def one_ahead(runner: Runner, steps: list[Step]) -> list[StepResult]:
    out: list[StepResult] = []
    for step in steps:
        runner.submit(step)
        if step.number > 1:
            out.append(runner.collect())
    return [*out, runner.collect()]


def test_steps_planned_ahead_bring_what_steps_one_by_one_bring(runner: Runner) -> None:
    steps = [first_step(admit(0), admit(1)), *[next_step(number, 0, 1) for number in range(2, 30)]]
    alone = one_by_one(runner, steps)
    ahead = one_ahead(runner, steps)
    assert [one.sampled for one in ahead] == [one.sampled for one in alone]
    assert [one.number for one in ahead] == list(range(1, 30))
    assert all(one.seconds > 0 for one in ahead)
    assert None not in [token for one in ahead for token in tokens_of(one)]


def test_the_likeliest_tokens_go_to_who_asked(runner: Runner) -> None:
    asks = replace(admit(0, Sampling()), top_n_tokens=3)
    runner.submit(first_step(asks, admit(1, Sampling())))
    [asked, silent] = [sampled.token for sampled in runner.collect().sampled]
    assert asked is not None
    assert silent is not None
    assert asked.top[0] == (asked.id, asked.logprob)
    logprobs = [logprob for _, logprob in asked.top]
    assert len(logprobs) == 3
    assert logprobs == sorted(logprobs, reverse=True)
    assert silent.top == ()


def test_the_runner_of_native_models_is_this_one(runner: Runner) -> None:
    assert isinstance(runner, NativeRunner)


def test_a_row_that_fails_voids_its_slot_in_the_step_planned_behind_it(runner: Runner) -> None:
    [good, *later] = one_by_one(runner, [first_step(admit(0), admit(1)), *[next_step(n, 0, 1) for n in range(2, 5)]])
    runner.submit(first_step(admit(0), admit(1, SENSELESS)))
    runner.submit(next_step(2, 0, 1))
    failed = runner.collect()
    runner.submit(next_step(3, 0))
    held = runner.collect()
    assert tokens_of(failed) == [tokens_of(good)[0], None]
    assert failed.sampled[1].error
    assert tokens_of(held) == [tokens_of(later[0])[0], None]
    assert "lost" in held.sampled[1].error
    assert tokens_of(runner.collect()) == tokens_of(later[1])[:1]
    runner.submit(first_step(admit(1)))
    assert tokens_of(runner.collect()) == tokens_of(good)[1:]


def test_a_step_that_cannot_run_is_lost_alone(runner: Runner) -> None:
    [_, second, third] = one_by_one(runner, [first_step(admit(0), admit(1)), *[next_step(n, 0, 1) for n in (2, 3)]])
    one_by_one(runner, [first_step(admit(0), admit(1)), next_step(2, 0, 1)])
    runner.submit(Step(3, (SlotWork(1, 40, 1, True),)))  # far beyond the known tokens
    runner.submit(Step(4, (next_step(3, 0).work[0], SlotWork(1, 13, 1, True))))
    runner.submit(next_step(4, 0))
    with pytest.raises(ValueError, match="known tokens"):
        runner.collect()
    void = runner.collect()
    assert tokens_of(void) == [tokens_of(third)[0], None]
    assert "lost" in void.sampled[1].error
    assert runner.collect().sampled[0].token is not None
    assert runner.alive
    [_, again] = one_by_one(runner, [first_step(admit(0), admit(1)), next_step(2, 0, 1)])
    assert tokens_of(again) == tokens_of(second)


def test_an_admission_waits_for_the_steps_that_use_its_slot(runner: Runner) -> None:
    """The slot is taken again while the step before still computes a void row of it."""
    [first, second] = one_by_one(runner, [first_step(admit(0)), next_step(2, 0)])
    runner.submit(first_step(admit(0)))
    runner.submit(next_step(2, 0))
    again = first_step(admit(0))
    runner.submit(Step(3, again.work, again.admissions, (0,), again.blocks))
    runner.submit(next_step(4, 0, first=3))
    results = [runner.collect() for _ in range(4)]
    assert [tokens_of(one) for one in results] == 2 * [tokens_of(first), tokens_of(second)]
    assert [one.number for one in results] == [1, 2, 3, 4]


def test_closing_waits_for_what_is_on_its_way(runner: Runner) -> None:
    for step in (first_step(admit(0)), next_step(2, 0), next_step(3, 0)):
        runner.submit(step)
    runner.close()
    assert None not in [tokens_of(runner.collect())[0] for _ in range(3)]
