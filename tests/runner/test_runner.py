"""The runner's thread: steps in order, a lost step stays alone, its slots are void until admitted anew."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from textmill.core import Admission, RunnerLimits, Sampled, Sampling, SlotWork, Step, TokenChoice
from textmill.runner.runner import LocalRunner
from textmill.runner.slots import SlotTables

LIMITS = RunnerLimits(block_size=4, num_blocks=8, max_slots=2, max_step_tokens=8, max_total_tokens=16, vocab_size=10)


class Scripted:
    """Answers the slot's length as token; raises when told to."""

    weight_bytes = 0
    buffer_bytes = 0
    dtype = "float32"
    compute_seconds = 0.0
    progress_ns = 0

    def __init__(self) -> None:
        self.tables = SlotTables(2, 16, 4)
        self.broken = False

    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        if self.broken:
            raise ValueError("the step is broken")
        return [Sampled(w.slot, TokenChoice(int(self.tables.length[w.slot]), 0.0)) for w in work]


def step(number: int, *slots: int, admit: Sequence[int] = ()) -> Step:
    admissions = tuple(Admission(slot, (1, 2, 3), Sampling()) for slot in admit)
    return Step(number, tuple(SlotWork(slot, 0, 3, True) for slot in slots), admissions)


def test_a_lost_step_voids_its_slots_and_nothing_else() -> None:
    executor = Scripted()
    runner = LocalRunner(executor, LIMITS)
    runner.submit(step(1, 0, admit=(0,)))
    assert [s.token.id for s in runner.collect().sampled if s.token] == [3]
    executor.broken = True
    runner.submit(step(2, 1, admit=(1,)))
    with pytest.raises(ValueError, match="the step is broken"):
        runner.collect()
    executor.broken = False
    runner.submit(step(3, 0, 1))
    first, second = runner.collect().sampled
    assert first.token is not None
    assert second.token is None
    assert "lost" in second.error
    runner.submit(step(4, 1, admit=(1,)))
    assert not runner.collect().sampled[0].error
    assert runner.alive
    runner.close()
    assert not runner.alive
