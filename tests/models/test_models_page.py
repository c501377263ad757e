"""docs/models.md: made of recorded results, and of all cases that there are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.models.test_parity import CASES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "scripts" / "models_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(*found: dict[str, Any]) -> str:
    return "\n".join(json.dumps({"family": "llama", "variant": "plain"} | one) for one in found)


def row(script: ModuleType, *found: dict[str, Any]) -> list[str]:
    page: str = script.page(script.gathered(lines({"file": "llama.py"}, *found)))
    return next(line for line in page.splitlines() if line.startswith("| llama |")).strip("| ").split(" | ")


def test_a_row_says_what_was_measured(script: ModuleType) -> None:
    ways = [{"executor": kind, way: True} for kind in ("torch", "native") for way in script.WAYS]
    errors = [{"executor": "torch", "error": 2e-6}, {"executor": "native", "error": 3e-6}]
    assert row(script, *errors, *ways, {"ranks": 2}, {"gguf": True})[1:7] == [
        "plain", "3e-06", "equal", "native, torch", "1, 2", "yes",
    ]  # fmt: skip
    assert row(script, *errors, *ways[:-1])[3] == "alone, together"
    assert row(script, {"executor": "torch", "error": 2e-6})[2:7] == ["2e-06", "–", "torch", "1", "–"]


def test_reasons_are_given_once(script: ModuleType) -> None:
    found = [{"variant": name, "no_ranks": "too few heads"} for name in ("a", "b")]
    page: str = script.page(script.gathered(lines(*found)))
    assert page.count("too few heads") == 1
    assert "- llama: one rank only: too few heads" in page
    assert "- llama (b): one rank" in script.page(script.gathered(lines({"variant": "a"}, found[1])))


def test_every_case_has_a_row_whose_figures_are_good() -> None:
    """Where it fails, run scripts/models_page.py: a case was added, or something is no longer equal."""
    cells = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "models.md").read_text().splitlines()]
    rows = {(cell[0], cell[1]): cell for cell in cells if len(cell) == 8}
    for case in CASES:
        _, _, error, tokens, *_ = rows[case.family, case.variant]
        assert float(error) <= 1e-4, case.id
        assert tokens == "equal", case.id
