"""Building a runner: a GGUF file on the native kernels is served without torch, which takes a second to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from textmill.kernels.dispatch import native_available

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
