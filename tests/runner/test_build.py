"""Building a runner: a GGUF file on the native kernels is served without torch, which takes a second to import.

A model that does what the native program cannot is served with torch, and the user reads why.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textmill.config import Settings
from textmill.errors import ConfigError
from textmill.kernels.dispatch import native_available
from textmill.kernels.native import Program
from textmill.kernels.rows import Unrecordable
from textmill.layers.mlp import GatedMLP
from textmill.runner.build import build_runner
from textmill.weights.source import ModelSource

CODE = """
import sys
from pathlib import Path
from textmill.config import Settings
from textmill.runner.build import build_runner
from textmill.weights.source import ModelSource

source = ModelSource("m", Path(sys.argv[1]), "gguf", "")
runner, info = build_runner(Settings(max_total_tokens=256), source, lambda *args, **fields: None)
runner.close()
print(info.dtype, "torch" in sys.modules)
"""


@pytest.mark.skipif(not native_available(), reason="the native kernels are not built here")
def test_a_gguf_file_needs_no_torch(default_model: Path) -> None:
    command = [sys.executable, "-c", CODE, str(default_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["packed", "False"], done.stderr


@pytest.fixture
def unrecordable_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GatedMLP.__call__
    monkeypatch.setattr(GatedMLP, "__call__", lambda self, x, *rest: torch.roll(plain(self, x, *rest), 1, -1))


@pytest.mark.skipif(not native_available(), reason="the native kernels are not built here")
@pytest.mark.usefixtures("unrecordable_mlp")
class TestFallback:
    def build(self, path: Path, kernels: str = "auto") -> tuple[Any, list[str]]:
        lines: list[str] = []

        def report(_phase: str, message: str, **_: object) -> None:
            lines.append(message)

        source = ModelSource("m", path, "gguf" if path.is_file() else "safetensors", "")
        runner, info = build_runner(Settings(max_total_tokens=64, kernels=kernels), source, report)
        runner.close()
        return info, lines

    def test_torch_serves(self, tiny_llama: Callable[..., Path]) -> None:
        info, lines = self.build(tiny_llama())
        assert info.dtype == "float32"
        assert [line for line in lines if "torch.roll" in line] == [
            "the native kernels have no torch.roll: this model runs with the torch kernels"
        ]

    def test_packed_weights_are_unpacked_once(self, default_model: Path) -> None:
        info, lines = self.build(default_model)
        assert info.dtype == "float32"
        assert any("no torch.roll" in line and "packed weights become float32" in line for line in lines)

    def test_it_is_refused_where_native_kernels_are_asked_for(self, tiny_llama: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"--kernels native: .* no torch\.roll"):
            self.build(tiny_llama(), "native")


@pytest.mark.skipif(not native_available(), reason="the native kernels are not built here")
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("operator -", lambda x: x - x),
        ("operator -", lambda x: 1.0 - x),
        ("operator /", lambda x: x / 2),
        ("operator []", lambda x: x[:, :2]),
        ("sum with a float", lambda x: x + 1.0),
        ("product with a Tensor", lambda x: x * torch.ones(8)),
        ("torch.mul", lambda x: torch.ones(8) * x),
        ("tensor operation .view", lambda x: x.view(2, 4)),
        ("torch.softmax", lambda x: torch.softmax(x, -1)),
        ("activation mish", lambda x: x.program.activation(x, "mish")),
    ],
)
def test_what_a_recording_lacks_is_named(name: str, use: Callable[[Any], Any]) -> None:
    import numpy as np

    from textmill.kernels.native import dense_weight

    p = Program(max_rows=4, max_slots=1, max_total_tokens=16, vocab_size=8)
    x = p.embed(dense_weight(np.eye(8, dtype=np.float32)))
    with pytest.raises(Unrecordable) as caught:
        use(x)
    assert caught.value.operation == name
