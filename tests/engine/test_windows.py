"""Sequences whose rows look back only so far: their blocks come back while they run, and hits need only the end."""

from __future__ import annotations

import pytest
from driver import Driver
from scripted import expected, limits

from textmill.engine.scheduler import EngineSettings
from textmill.engine.sequence import State

BLOCK = 4
REACH = 10


def driver(blocks: int, reach: int = REACH, ahead: int = 1, speculate: int = 0) -> Driver:
    its_limits = limits(block_size=BLOCK, num_blocks=blocks, max_step_tokens=8, reach=reach)
    return Driver(its_limits, EngineSettings(steps_ahead=ahead, speculate=speculate))


def most_used(engine: Driver) -> int:
    """Runs until all is done; the most blocks that were held at once."""
    used = 0
    while engine.scheduler.busy or engine.in_flight:
        engine.turn()
        used = max(used, engine.scheduler.pool.used)
    engine.finish()
    return used


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("speculate", [0, 4])
def test_a_long_sequence_holds_a_window_and_the_steps_in_flight(ahead: int, speculate: int) -> None:
    engine = driver(40, ahead=ahead, speculate=speculate)
    engine.arrive(range(30), 110)
    steps = (ahead + 1) * 8  # not settled yet, so not given back
    assert 4 <= most_used(engine) <= -(-(REACH + steps) // BLOCK) + 1
    whole = driver(40, reach=0, ahead=ahead, speculate=speculate)
    whole.arrive(range(30), 110)
    assert most_used(whole) >= 34


def test_neighbours_use_what_was_left_behind() -> None:
    """Eight that together are five times as long as the cache, and nobody is put aside."""
    engine = driver(56)
    for number in range(8):
        engine.arrive([number] * 9, 120)
    assert most_used(engine) <= 56
    assert engine.counters.preemptions == 0


def test_a_hit_needs_no_more_than_the_window() -> None:
    engine = driver(16)
    prompt = list(range(40))
    first = engine.arrive(prompt, 1)
    engine.finish()
    pool = engine.scheduler.pool
    pool.release(pool.take(8))  # the oldest: what was left behind first, the beginning of the prompt
    assert first is not None
    assert engine.scheduler.prefix.look_up(first.sequence) == []
    watched = engine.arrive(prompt, 5)
    assert watched is not None
    while watched.sequence.state is not State.FINISHED:
        engine.turn()
    assert watched.first is not None
    assert watched.first.cached_tokens == 36
    assert watched.tokens == expected(watched.sequence.request, engine.limits.vocab_size, engine.total)


def test_a_hole_inside_the_window_is_no_hit() -> None:
    engine = driver(16)
    prompt = list(range(40))
    first = engine.arrive(prompt, 1)
    assert first is not None
    engine.finish()
    found = engine.scheduler.prefix.look_up_all(first.sequence)
    engine.scheduler.prefix.forget([block for block in found[7:8] if block is not None])
    second = engine.arrive(prompt, 1)
    engine.finish()
    assert second is not None
    assert second.first is not None
    assert second.first.cached_tokens == 28


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("speculate", [0, 4])
def test_sequences_longer_than_the_cache(count: int, speculate: int) -> None:
    engine = driver(10, speculate=speculate)  # 40 tokens
    watched = [engine.arrive([*range(30), number, *range(50)], 100) for number in range(count)]
    engine.finish()
    assert all(one is not None and len(one.tokens) == 100 for one in watched)
    tiny = driver(8)  # too few for a window and two steps: only what fits as a whole
    assert tiny.arrive(range(33), 1) is None
