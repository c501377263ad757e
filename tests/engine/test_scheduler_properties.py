"""Whatever arrives, leaves, breaks or runs short: every request gets exactly the tokens it gets alone."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from driver import Driver
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scripted import limits

from textmill.engine.scheduler import EngineSettings

VOCABULARY = 7


def shared_prefix(length: int) -> list[int]:
    return [(i * i) % VOCABULARY for i in range(length)]


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events, and hypothesis finds a short one that breaks."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(4, 16),
        slots=st.integers(1, 5),
        step_tokens=st.integers(1, 16),
        budget=st.one_of(st.none(), st.integers(1, 16)),
        beside=st.one_of(st.none(), st.integers(1, 4)),
        caching=st.booleans(),
        speculate=st.sampled_from([0, 0, 1, 3, 8]),
        reach=st.sampled_from([0, 0, 1, 2, 5, 9]),
        ahead=st.integers(0, 2),
    )
    def begin(
        self,
        block_size: int,
        num_blocks: int,
        slots: int,
        step_tokens: int,
        budget: int | None,
        beside: int | None,
        caching: bool,
        speculate: int,
        reach: int,
        ahead: int,
    ) -> None:
        its_limits = limits(
            block_size=block_size,
            num_blocks=num_blocks,
            max_slots=slots,
            max_step_tokens=step_tokens,
            max_total_tokens=40,
            vocab_size=VOCABULARY,
            reach=reach,
        )
        its_settings = EngineSettings(
            max_batch_prefill_tokens=budget,
            prefill_tokens_beside_decode=beside,
            prefix_caching=caching,
            steps_ahead=ahead,
            speculate=speculate,
        )
        self.driver = Driver(its_limits, its_settings)

    @rule(
        prefix=st.integers(0, 20),
        tail=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        new=st.integers(1, 24),
        stop=st.lists(st.integers(0, VOCABULARY - 1), max_size=1),
        logprobs=st.booleans(),
        salt=st.sampled_from([b"", b"", b"tenant"]),
    )
    def arrive(self, prefix: int, tail: list[int], new: int, stop: list[int], logprobs: bool, salt: bytes) -> None:
        self.driver.arrive(shared_prefix(prefix) + tail, new, tuple(stop), logprobs, salt)

    @rule(times=st.integers(1, 6))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.driver.turn()

    @precondition(lambda self: self.driver.watched)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.driver.cancel(data.draw(st.sampled_from(self.driver.watched)))

    @rule()
    def break_launch(self) -> None:
        self.driver.break_launch()

    @rule(rows=st.one_of(st.none(), st.sets(st.integers(0, 3), min_size=1, max_size=2)))
    def break_step(self, rows: set[int] | None) -> None:
        self.driver.break_step(rows)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def random_driver(dice: random.Random, speculate: int, windowed: bool) -> Driver:
    its_limits = limits(
        block_size=dice.choice([1, 2, 4]),
        num_blocks=dice.randint(6, 10 if windowed else 20),  # sequences that leave blocks behind fight less for them
        max_slots=dice.randint(1, 6),
        max_step_tokens=dice.randint(1, 12),
        max_total_tokens=dice.randint(10, 40),
        vocab_size=VOCABULARY,
        reach=dice.randint(1, 16) if windowed else 0,
    )
    its_settings = EngineSettings(
        max_batch_prefill_tokens=dice.choice([None, 1, 3, 8]),
        prefill_tokens_beside_decode=dice.choice([None, None, 1, 3]),
        prefix_caching=dice.random() < 0.8,
        steps_ahead=dice.choice([0, 1, 1, 2]),
        speculate=speculate,
    )
    driver = Driver(its_limits, its_settings)
    if dice.random() < 0.5:  # measurements without sense: pacing may slow prompts down, never change or starve them
        driver.runner.clock = lambda step: 10 ** dice.uniform(-6, 2)
    return driver


def random_arrival(driver: Driver, dice: random.Random) -> None:
    tail = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 5))]
    stop = (dice.randrange(VOCABULARY),) if dice.random() < 0.4 else ()
    salt = dice.choice([b"", b"", b"tenant"])
    driver.arrive(shared_prefix(dice.randint(0, 20)) + tail, dice.randint(1, 24), stop, dice.random() < 0.3, salt)


def crowd(seed: int, trouble: float, speculate: int, windowed: bool) -> Driver:
    """A random engine and a random crowd, from a seed: many sequences fighting for few blocks."""
    dice = random.Random(seed)
    driver = random_driver(dice, speculate, windowed)
    for _ in range(40):
        if dice.random() < 0.4:
            random_arrival(driver, dice)
        chance = dice.random()
        if chance < trouble and driver.watched:
            driver.cancel(dice.choice(driver.watched))
        elif chance < 1.5 * trouble:
            driver.break_step(None if dice.random() < 0.3 else {dice.randrange(3)})
        elif chance < 1.7 * trouble:
            driver.break_launch()
        else:
            driver.turn()
    driver.finish()
    return driver


CASES = ("preemptions", "prefix_hit_tokens", "void_rows", "generated_tokens")
GUESSES = ("speculated_tokens_accepted", "speculated_tokens_rejected")


@pytest.mark.parametrize("trouble", [0.0, 0.1])
@pytest.mark.parametrize("speculate", [0, 5])
@pytest.mark.parametrize("windowed", [False, True])
def test_crowds_get_what_each_gets_alone(trouble: float, speculate: int, windowed: bool) -> None:
    counted: Counter[str] = Counter()
    for seed in range(150):
        values = crowd(seed, trouble, speculate, windowed).counters.values()
        counted.update({name: int(values[name]) for name in (*CASES, *GUESSES)})
    cases = (*CASES, *GUESSES) if speculate else CASES
    least = 30 if windowed else 100
    assert min(counted[name] for name in cases) > least, counted  # the crowds do meet every case
    assert speculate or not any(counted[name] for name in GUESSES)
