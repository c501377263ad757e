"""The registry: every row has its file and every file its row; what GGUF files hold is served without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import textmill.models
from tests.models.test_parity import CASES
from textmill.models.registry import FAMILIES

FOLDER = Path(textmill.models.__file__).parent
PARTS = {"__init__", "registry", "t5_encoder", "vision"}  # no family's own file

WITHOUT_TORCH = """
import importlib, sys
from textmill.models.registry import FAMILIES
from textmill.weights.gguf_names import FAMILIES as IN_FILES
for family in {row.model_type for row in IN_FILES.values()}:
    importlib.import_module(f"textmill.models.{FAMILIES[family]}")
print("torch" in sys.modules)
"""


def test_rows_and_files_belong_together() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - PARTS
    assert set(FAMILIES.values()) == files


def test_every_family_has_a_case() -> None:
    covered = {case.family for case in CASES}
    assert set(FAMILIES) - covered == set()


def test_families_of_gguf_files_need_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
