"""Guesses in plans: their place, their bounds, and that they never cost anybody anything but time."""

from __future__ import annotations

import pytest
from driver import Driver
from scripted import limits

from textmill.core import Finish, SlotWork
from textmill.engine.drafts import cut
from textmill.engine.scheduler import EngineSettings

CIRCLE = [1, 2, 3, 4] * 5  # the scripted model goes round in circles of four


def served(speculate: int, *, new: int = 40, **sizes: int) -> Driver:
    driver = Driver(limits(**sizes), EngineSettings(speculate=speculate))
    driver.arrive(CIRCLE, new)
    driver.finish()
    return driver


def drafts(driver: Driver) -> list[SlotWork]:
    return [work for step in driver.runner.steps for work in step.work if work.draft]


def test_right_guesses_save_steps() -> None:
    plain, guessing = served(0, new=200), served(6, new=200)
    assert not drafts(plain)
    assert len(guessing.runner.steps) < 0.7 * len(plain.runner.steps)
    counted = guessing.counters
    guessed = sum(len(work.draft) for work in drafts(guessing))
    assert counted.speculated_tokens_accepted + counted.speculated_tokens_rejected == guessed
    assert counted.speculated_tokens_accepted > 0
    assert counted.generated_tokens == plain.counters.generated_tokens == 200


def test_a_draft_stands_behind_the_newest_known_token() -> None:
    driver = served(6)
    for work in drafts(driver):
        assert work.samples
        assert work.count == 1 + len(work.draft)
        assert len(work.draft) <= 6
        assert work.start + work.count < len(CIRCLE) + 40


def test_steps_are_planned_one_by_one_only_while_somebody_guesses() -> None:
    driver = Driver(limits(), EngineSettings(speculate=4))
    driver.arrive(CIRCLE, 60)
    ahead: dict[bool, set[int]] = {True: set(), False: set()}
    while driver.scheduler.busy:
        driver.turn()
        guesser = driver.watched[0].sequence.guesser
        ahead[guesser is not None and guesser.active].add(len(driver.in_flight))
    assert ahead[True] <= {0, 1}
    assert 0 in ahead[True]
    assert max(ahead[False]) == 1
    driver.finish()


@pytest.mark.parametrize("blocks", [15, 16, 17, 18])
def test_nobody_is_preempted_for_a_guess(blocks: int) -> None:
    """Just enough blocks for two, with none, one, two, three to spare."""
    for speculate in (0, 8):
        driver = Driver(limits(num_blocks=blocks * 2, block_size=4), EngineSettings(speculate=speculate))
        driver.arrive(CIRCLE, 39)
        driver.arrive([5, *CIRCLE], 38)
        driver.finish()
        assert driver.counters.preemptions == 0


def test_guesses_keep_to_the_budget_of_a_step() -> None:
    driver = Driver(limits(max_step_tokens=3), EngineSettings(speculate=8))
    driver.arrive(CIRCLE, 60)
    driver.finish()
    assert {len(work.draft) for work in drafts(driver)} == {1, 2}


def test_an_ending_token_ends_an_accepted_run() -> None:
    plain = served(0).watched[0]
    stop = next(token for token in plain.tokens[12:] if token not in plain.tokens[:12])
    driver = Driver(limits(), EngineSettings(speculate=6))
    ended = driver.arrive(CIRCLE, 40, (stop,))
    driver.finish()
    assert ended is not None
    assert ended.finish is Finish.EOS
    assert ended.tokens == plain.tokens[: plain.tokens.index(stop) + 1]


def test_nothing_is_guessed_behind_an_ending_token() -> None:
    assert cut((1, 2, 3), (3,)) == (1, 2)
    assert cut((1, 2, 3), (1, 2)) == ()
    assert cut((1, 2, 3), ()) == (1, 2, 3)


def test_guesses_beside_prompts() -> None:
    driver = Driver(limits(max_step_tokens=16, num_blocks=128), EngineSettings(speculate=6))
    driver.arrive(CIRCLE, 60)
    for _ in range(12):
        driver.turn()
    driver.arrive(range(50), 30)
    driver.finish()
    mixed = [step for step in driver.runner.steps if len(step.work) == 2 and any(work.draft for work in step.work)]
    assert mixed
