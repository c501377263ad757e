"""Prompts beside running streams: what is learned from steps, and how many prompt tokens that allows."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from driver import Driver
from hypothesis import given
from scripted import limits

from textmill.core import Step
from textmill.engine.pacing import BURST_FEWEST, BURST_SECONDS, FEWEST, FRESH, STRETCH, Pacing
from textmill.engine.scheduler import EngineSettings

TOKEN = 0.001  # seconds of a prompt token
QUIET = 0.020  # seconds of a step without prompts


def taught(quiet: float = QUIET, token: float = TOKEN) -> Pacing:
    pacing = Pacing()
    pacing.observe(8, 0, quiet)
    pacing.observe(0, 100, 100 * token)
    return pacing


def test_a_step_stretches_to_its_bound() -> None:
    assert taught().allowance(8, 8, 1) == pytest.approx((STRETCH - 1) * QUIET / TOKEN, abs=1)


def test_nothing_is_bounded_before_both_costs_are_known() -> None:
    pacing = Pacing()
    assert pacing.allowance(8, 8, 1) is None
    pacing.observe(0, 100, 0.1)
    assert pacing.allowance(8, 8, 1) is None
    pacing.observe(8, 0, QUIET)
    assert pacing.allowance(8, 8, 1) is not None


def test_nothing_is_bounded_while_nobody_decodes() -> None:
    assert taught().allowance(0, 0, 1) is None


@pytest.mark.parametrize(
    ("decoding", "newcomers", "burst"), [(1, 1, False), (4, 2, True), (8, 3, False), (8, 4, True), (2, 9, True)]
)
def test_a_burst_of_newcomers_goes_first(decoding: int, newcomers: int, burst: bool) -> None:
    pacing = taught(token=TOKEN / 10)
    beside = int((STRETCH - 1) * QUIET / TOKEN * 10)
    wanted = int(BURST_SECONDS / TOKEN * 10) if burst else beside
    assert pacing.allowance(8, decoding, newcomers) == pytest.approx(wanted, abs=1)


def test_a_burst_goes_in_pieces_that_compute_well() -> None:
    assert taught().allowance(0, 0, 2) == BURST_FEWEST
    assert Pacing().allowance(0, 0, 2) == BURST_FEWEST
    assert taught(token=TOKEN / 10).allowance(0, 0, 2) == pytest.approx(BURST_SECONDS / TOKEN * 10, abs=1)


def test_in_a_burst_who_came_first_is_answered_first() -> None:
    driver = Driver(limits(num_blocks=512, max_slots=16, max_step_tokens=1024, max_total_tokens=1024), EngineSettings())
    driver.runner.clock = seconds_of
    for number in range(8):
        driver.arrive([(number + i) % 50 for i in range(100)], 20)
    driver.finish()
    prompts = [sum(work.count for work in step.work if work.count > 1) for step in driver.runner.steps]
    assert prompts[:4] == [BURST_FEWEST] * 4
    first_samples = [
        next(n for n, step in enumerate(driver.runner.steps) for w in step.work if w.slot == slot and w.samples)
        for slot in range(8)
    ]
    assert sorted(first_samples) == first_samples
    assert first_samples[0] == 0


def test_averages_follow_and_hiccups_hardly_count() -> None:
    pacing = taught()
    before = pacing.allowance(8, 8, 1)
    pacing.observe(8, 0, 1000.0)
    assert pacing.quiet_seconds(8) < 2 * QUIET
    for _ in range(60):
        pacing.observe(8, 0, QUIET)
        pacing.observe(0, 100, 100 * 2 * TOKEN)
    after = pacing.allowance(8, 8, 1)
    assert before is not None
    assert after == pytest.approx(before / 2, abs=1)


def test_a_machine_that_slows_down_changes_nothing() -> None:
    pacing = taught()
    before = pacing.allowance(8, 8, 1)
    for _ in range(FRESH):
        pacing.observe(8, 50, QUIET + 50 * TOKEN)
    for _ in range(60):
        pacing.observe(8, 50, 3 * (QUIET + 50 * TOKEN))
    assert pacing.quiet_seconds(8) == pytest.approx(3 * QUIET, rel=0.01)
    assert pacing.allowance(8, 8, 1) == before


def test_what_a_prompt_costs_is_found_from_steps_with_both() -> None:
    pacing = taught(token=5 * TOKEN)
    for _ in range(FRESH):
        pacing.observe(8, 50, QUIET + 50 * TOKEN)
    assert pacing.allowance(8, 8, 1) == pytest.approx((STRETCH - 1) * QUIET / TOKEN, abs=2)


def test_counts_not_seen_yet_are_guessed_from_others() -> None:
    pacing = Pacing()
    pacing.observe(2, 0, 0.010)
    pacing.observe(8, 0, 0.020)
    assert pacing.quiet_seconds(1) == 0.010
    assert pacing.quiet_seconds(3) == 0.020
    assert pacing.quiet_seconds(16) == pytest.approx(0.040)


def test_a_decode_token_is_worth_a_prompt_token_whatever_was_measured() -> None:
    pacing = taught(quiet=1e-6)
    assert pacing.allowance(8, 8, 1) == FEWEST
    assert pacing.allowance(100, 100, 1) == int((STRETCH - 1) * 100)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99), st.floats(0, 1e6)), max_size=20))
def test_a_prompt_always_gets_on(steps: list[tuple[int, int, float]]) -> None:
    pacing = Pacing()
    for decode_tokens, prompt_tokens, seconds in steps:
        pacing.observe(decode_tokens, prompt_tokens, seconds)
    allowed = pacing.allowance(4, 4, 1)
    assert allowed is None or allowed >= FEWEST


def seconds_of(step: Step) -> float:
    """A machine on which every step takes 20 ms and every prompt token another one."""
    return QUIET + TOKEN * sum(work.count for work in step.work if work.count > 1)


def longest_prompt_step(pacing: bool) -> int:
    """Eight streams decode, then a long prompt arrives: the most tokens of it in one step."""
    settings = EngineSettings(prefill_pacing=pacing)
    driver = Driver(limits(num_blocks=512, max_slots=16, max_step_tokens=256, max_total_tokens=1024), settings)
    driver.runner.clock = seconds_of
    for number in range(8):
        driver.arrive([(number + i) % 50 for i in range(70)], 60)
    for _ in range(10):
        driver.turn()
    seen = len(driver.runner.steps)
    driver.arrive([i % 50 for i in range(400)], 5)
    driver.finish()
    return max(work.count for step in driver.runner.steps[seen:] for work in step.work)


def test_running_streams_hardly_feel_a_long_prompt() -> None:
    assert longest_prompt_step(pacing=True) == pytest.approx((STRETCH - 1) * QUIET / TOKEN, abs=4)


def test_pacing_can_be_turned_off() -> None:
    assert longest_prompt_step(pacing=False) == 256 - 8
