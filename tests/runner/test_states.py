"""Models with a state per slot through `build_runner`: no key/value bytes, slots as memory allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.cases.state import mamba
from textmill.config import Settings
from textmill.core import Admission, Sampling, SlotWork, Step
from textmill.errors import ConfigError
from textmill.runner import build
from textmill.runner.build import build_runner
from textmill.runner.memory import slots_that_fit
from textmill.weights.source import ModelSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states")
    mamba()(path)
    return path


def test_blocks_without_bytes(folder: Path) -> None:
    lines: list[str] = []
    source = ModelSource("m", folder, "safetensors", "")
    settings = Settings(max_total_tokens=64, max_batch_size=3)
    runner, info = build_runner(settings, source, lambda phase, text, **_: lines.append(text))
    try:
        assert not any("torch" in line for line in lines), lines
        assert (runner.limits.forward_only, runner.limits.reach, runner.limits.encodes) == (True, 0, False)
        assert info.num_blocks == 3 * 64 // 16
        runner.submit(Step(1, (SlotWork(2, 0, 5, True),), (Admission(2, (3, 4, 5, 6, 7), Sampling()),)))
        assert runner.collect().sampled[0].token is not None
    finally:
        runner.close()


def test_nothing_counts_positions(folder: Path) -> None:
    settings = Settings(max_total_tokens=5000, max_batch_size=1)
    runner, info = build_runner(settings, ModelSource("m", folder, "safetensors", ""), lambda *_, **__: None)
    runner.close()
    assert info.max_total_tokens == 5000


def test_as_many_slots_as_have_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = 2 * 96 * (3 + 8) * 4  # layers, channels, states: floats
    assert slots_that_fit(128, each, 20 * each) == 10
    with pytest.raises(ConfigError, match="Not enough memory for the state of a sequence"):
        slots_that_fit(128, each, each)
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    monkeypatch.setattr(build, "free_memory", lambda: weights + 21 * each)
    runner, info = build_runner(
        Settings(max_total_tokens=64), ModelSource("m", folder, "safetensors", ""), lambda *_, **__: None
    )
    runner.close()
    assert info.max_slots == 10
