"""`--profile`: kernels' times land with the steps they belong to, and read as shares of limits."""

from __future__ import annotations

import logging
from typing import cast

import pytest

from textmill.kernels.limits import MachineLimits
from textmill.kernels.native import OperationProfile, Program
from textmill.runner.profile import Profiler, size_of

LIMITS = MachineLimits(threads=2, read_gb_s=20.0, byte_gmac_s=300.0, float_gmac_s=100.0)

HEAD_WORDS = ["kernel", "calls/step", "ms/step", "share", "GB/s", "of", "limit", "GMAC/s", "of", "limit"]


class Clocked:
    """What the profiler needs of a program: sums of one kernel, since the last reset."""

    def __init__(self) -> None:
        self.enabled = False
        self.calls = 0

    def set_profiling(self, enabled: bool) -> None:
        self.enabled = enabled

    def reset_profile(self) -> None:
        self.calls = 0

    def profile(self) -> list[OperationProfile]:
        each = OperationProfile("matmul 8x8", 1, 0.001, 10_000_000, 150_000_000)
        count = self.calls
        return [OperationProfile(each.name, count, each.seconds * count, each.bytes * count, each.macs * count)]


def run(profiler: Profiler, program: Clocked, rows: int) -> None:
    """A step of one kernel of 1 ms, and 1 ms between."""
    profiler.begin(rows)
    program.calls += 1
    profiler.end(0.002)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level(logging.INFO, "textmill")
    program = Clocked()
    profiler = Profiler(cast(Program, program), LIMITS, packed=True)
    assert program.enabled
    for rows in (1, 1, 100, 1, 1, 5):
        run(profiler, program, rows)
    profiler.report()
    profiler.report()  # nothing new: nothing to say
    return [record.getMessage() for record in caplog.records]


def test_each_size_of_step_has_its_table(lines: list[str]) -> None:
    heads = [place for place, line in enumerate(lines) if line.startswith("steps of")]
    assert [lines[place] for place in heads] == ["steps of 1 row", "steps of 33-128 rows", "steps of 2-8 rows"]
    for place in heads:
        assert lines[place + 1].split() == HEAD_WORDS
        kernel = lines[place + 2].split()
        assert kernel[:2] == ["matmul", "8x8"]
        assert kernel[2:] == ["1", "1.000", "50", "%", "10.0", "50", "%", "150.0", "50", "%"]
        assert lines[place + 3].split() == ["between", "kernels", "1.000", "50", "%"]


@pytest.mark.parametrize(
    ("rows", "size"), [(1, "1 row"), (2, "2-8 rows"), (8, "2-8 rows"), (9, "9-32 rows"), (512, "over 128 rows")]
)
def test_sizes(rows: int, size: str) -> None:
    assert size_of(rows) == size
