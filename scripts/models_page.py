"""Writes docs/models.md from what the parity tests measured: `scripts/models_page.py [results.jsonl]`.

Without a file of results it runs the tests that record them first (TEXTMILL_PARITY names the file they write to).
Each line of it (tests/models/parity.py writes them) is one JSON object with `family`, `variant` and some of: `file`,
`executor`, `error`, `alone`, `together`, `preempted`, `ranks`, `gguf`, and reasons: `not_native`, `no_prefix_cache`,
`no_ranks`, `no_gguf`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
MODELS = ROOT / "src" / "textmill" / "models"
RECORDING = ["tests/models"]
WAYS = ("alone", "together", "preempted")

HEAD = """\
# Model families

Written by `scripts/models_page.py` from what `tests/models` measured; not by hand.

Each row is a tiny random float32 checkpoint, made by the tests, and its oracle: transformers, or where it has no such
model a reference in plain torch (`tests/models`).

- **error**: the largest difference of a logit, over a prompt in three chunks, on all executors (allowed: 1e-4).
- **tokens**: whether 32 greedy tokens are the oracle's: alone and again from the prefix cache; in a batch of eight of
  mixed lengths with prompts in chunks; and with half the blocks, so that sequences are put aside and computed again.
- **kernels**: the executors it was measured on; `torch` alone where the native kernels lack an operation.
- **ranks**: one and two mean that two ranks compute the same.
- **GGUF**: whether the family is read from GGUF files too, equal to the same oracle.
- **file**: the model's file in `src/textmill/models`, and its lines.

Two ropes differ from transformers on purpose, so that a position's angle never changes and what is cached stays right:

- longrope turns by its long divisors from the first token on if the server allows sequences longer than the trained
  length (transformers: once a sequence is longer, and then all of it anew);
- a dynamic rope served beyond the trained length has the base of the longest sequence allowed (transformers: of the
  current one). With `--max-total-tokens` up to the trained length both are what transformers has for short sequences.
"""
WHY = "What a row lacks, and why:"
COLUMNS = ("family", "variant", "error", "tokens", "kernels", "ranks", "GGUF", "file")
Case = dict[str, Any]


def main() -> int:
    if len(sys.argv) > 1:
        results = Path(sys.argv[1]).read_text(encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.jsonl"
            tests = [sys.executable, "-m", "pytest", "-q", *RECORDING]
            done = subprocess.run(tests, cwd=ROOT, env=os.environ | {"TEXTMILL_PARITY": str(file)}, check=False)
            if done.returncode:
                print("models_page: some tests failed; the page stays as it is", file=sys.stderr)
                return 1
            results = file.read_text(encoding="utf-8")
    cases = gathered(results)
    PAGE.write_text(page(cases), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(cases)} rows")
    return 0


def gathered(results: str) -> list[Case]:
    """One entry per family and variant, by family and then as the cases stand; a field's values side by side."""
    places: dict[tuple[str, str], int] = {}
    cases: dict[tuple[str, str], Case] = {}
    for place, line in enumerate(results.splitlines()):
        found = json.loads(line)
        key = (found.pop("family"), found.pop("variant"))
        if "file" in found:  # written when a case is prepared; other tests' columns may come earlier
            places.setdefault(key, place)
        case = cases.setdefault(key, {"family": key[0], "variant": key[1], "seen": defaultdict(set)})
        executor = found.pop("executor", None)
        if executor:
            case["seen"]["executor"].add(executor)
        for name, value in found.items():
            case["seen"][name].add((executor, value) if name in WAYS else value)
    return [cases[key] for key in sorted(cases, key=lambda key: (key[0], places.get(key, 0)))]


def page(cases: list[Case]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *map(cells_of, cases))]
    families = len({case["family"] for case in cases})
    files = {file for case in cases for file in case["seen"]["file"]}
    lines = [lines_of(file) for file in files]
    total = (
        f"{families} families in {len(files)} files of {sum(lines)} lines (the longest has {max(lines, default=0)})."
    )
    reasons = reasons_of(cases)
    return "\n".join([HEAD, *rows, "", total, *(["", WHY, ""] if reasons else []), *reasons, ""])


def cells_of(case: Case) -> tuple[str, ...]:
    seen = case["seen"]
    errors, ranks = seen["error"], seen["ranks"]
    return (
        case["family"],
        case["variant"],
        f"{max(errors):.0e}" if errors else "–",
        tokens_of(seen),
        ", ".join(sorted(seen["executor"])) or "–",
        ", ".join(["1", *map(str, sorted(ranks))]),
        "yes" if True in seen["gguf"] else "–",
        ", ".join(f"`{file}` {lines_of(file)}" for file in sorted(seen["file"])),
    )


def tokens_of(seen: dict[str, set[Any]]) -> str:
    """Equal on every executor, in every way; a test that did not run is not counted as equal."""
    wanted = {(executor, True) for executor in seen["executor"]}
    right = [way for way in WAYS if seen[way] >= wanted]
    return "equal" if len(right) == len(WAYS) else ", ".join(right) or "–"


def reasons_of(cases: list[Case]) -> list[str]:
    """Why something is not so, once for each family, with the variants if it is not so in these alone."""
    said = {
        "not_native": "no native kernels",
        "no_prefix_cache": "no prefix cache",
        "no_ranks": "one rank only",
        "no_gguf": "not in GGUF files",
    }
    variants: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for case in cases:
        for name, what in said.items():
            for reason in case["seen"][name]:
                variants[case["family"], what, reason].append(case["variant"])
    out = []
    for (family, what, reason), found in sorted(variants.items()):
        every = len(found) == sum(case["family"] == family for case in cases)
        where = "" if every else " (" + "; ".join(found) + ")"
        out.append(f"- {family}{where}: {what}: {reason}")
    return out


def lines_of(file: str) -> int:
    return len((MODELS / file).read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    sys.exit(main())
