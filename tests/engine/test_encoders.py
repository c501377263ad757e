"""What encoders read: part of what a block's contents depend on, checked at the door, and counted in a step."""

from __future__ import annotations

import pytest
from driver import Driver, Watched
from scripted import limits

from textmill.core import Request
from textmill.engine.admission import refusal
from textmill.engine.blocks import BlockPool
from textmill.engine.prefix import PrefixCache
from textmill.engine.scheduler import EngineSettings
from textmill.engine.sequence import Sequence


def sequence(number: int, encoder_tokens: tuple[int, ...]) -> Sequence:
    return Sequence(Request(number, tuple(range(9)), 20, encoder_tokens=encoder_tokens), number, 29)


def test_the_same_text_beside_another_source_is_no_hit() -> None:
    pool = BlockPool(16)
    cache = PrefixCache(pool, 4)
    first = sequence(1, (5, 6))
    first.blocks = pool.take(3)
    first.computed = first.settled = 9
    cache.register(first)
    assert cache.look_up(sequence(2, (5, 6))) == first.blocks[:2]
    assert cache.look_up(sequence(3, (5, 7))) == []
    assert cache.look_up(sequence(4, (5,))) == []
    assert cache.look_up(sequence(5, ())) == []


@pytest.mark.parametrize(
    ("tokens", "encodes", "reason"),
    [
        ((3, 4), True, ""),
        ((), False, ""),
        ((), True, "nothing to read"),
        ((3,), False, "no encoder"),
        ((3,) * 101, True, "101 tokens to read, and 100 are the most"),
        ((3, 50), True, "outside the vocabulary of 50"),
        ((-1,), True, "outside the vocabulary of 50"),
    ],
)
def test_the_door(tokens: tuple[int, ...], encodes: bool, reason: str) -> None:
    found = refusal(Request(1, (0,), 4, encoder_tokens=tokens), 100, 50, encodes=encodes)
    assert (reason in found) if reason else not found


def test_a_step_reads_no_more_sources_than_it_would_compute_tokens() -> None:
    engine = Driver(limits(max_step_tokens=32), EngineSettings(steps_ahead=0))
    for number in range(1, 9):
        request = Request(number, (number,), 4, encoder_tokens=(1,) * 15)
        engine.watched.append(Watched(Sequence(request, number, 5)))
        engine.scheduler.add(engine.watched[-1].sequence)
    engine.finish()
    admitted = [len(step.admissions) for step in engine.runner.steps]
    assert [count for count in admitted if count] == [2, 2, 2, 2]
    assert all(one.encoder_tokens == (1,) * 15 for step in engine.runner.steps for one in step.admissions)
