"""What a model's memory rules out is off, and the log says why; whatever it does not rule out stays."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest
from driver import Driver
from scripted import limits

from textmill.engine.scheduler import EngineSettings
from textmill.engine.suited import suited


def test_ordinary_models_keep_everything(caplog: pytest.LogCaptureFixture) -> None:
    settings = EngineSettings(speculate=4)
    with caplog.at_level(logging.INFO):
        assert suited(settings, limits()) == settings
    assert not caplog.records


def test_a_state_that_only_moves_forward_is_neither_shared_nor_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    forward = replace(limits(), forward_only=True)
    with caplog.at_level(logging.INFO):
        found = suited(EngineSettings(speculate=4, steps_ahead=0), forward)
    assert found == EngineSettings(speculate=0, prefix_caching=False, steps_ahead=0)
    assert [line.split(" is off")[0] for line in caplog.messages] == ["the prefix cache", "--speculate"]


def test_what_is_off_already_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        suited(EngineSettings(prefix_caching=False), replace(limits(), forward_only=True))
    assert not caplog.records


def test_a_state_sees_every_token_once_and_in_order() -> None:
    """The scripted runner raises otherwise; sequences are preempted, and begin again."""
    preemptions = 0
    for seed in range(40):
        dice = random.Random(seed)
        tight = replace(limits(num_blocks=dice.randint(8, 14), max_slots=5, max_step_tokens=9), forward_only=True)
        settings = EngineSettings(speculate=4, steps_ahead=dice.choice([0, 1, 2]))
        engine = Driver(replace(tight, max_total_tokens=30), suited(settings, tight))
        for number in range(12):
            engine.arrive([1] * dice.randint(1, 12) + [number], dice.randint(1, 16))
            if dice.random() < 0.2:
                engine.break_step({dice.randrange(3)})
            else:
                engine.turn()
        engine.finish()
        preemptions += int(engine.counters.values()["preemptions"])
    assert preemptions > 10
