"""What `--profile` asks for: tables of the kernels' time in the log, by size of step, against the machine's limits.

Taking the time of every kernel costs about a hundredth of a step. All methods belong to the runner's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from textmill.kernels.limits import MachineLimits
from textmill.kernels.native import OperationProfile, Program
from textmill.observe.logs import event

log = logging.getLogger(__name__)

SECONDS_BETWEEN_REPORTS = 10.0
SIZES = (1, 8, 32, 128)  # rows; small steps are bound by reading the weights, large ones by arithmetic
HEAD = ("kernel", "calls/step", "ms/step", "share", "GB/s", "of limit", "GMAC/s", "of limit")


@dataclass(slots=True)
class Work:
    """Steps of one size since the last report."""

    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    kernels: dict[str, OperationProfile] = field(default_factory=dict)

    def add(self, profiles: Iterable[OperationProfile]) -> None:
        for new in profiles:
            old = self.kernels.get(new.name, OperationProfile(new.name, 0, 0.0, 0, 0))
            self.kernels[new.name] = OperationProfile(
                new.name,
                old.calls + new.calls,
                old.seconds + new.seconds,
                old.bytes + new.bytes,
                old.macs + new.macs,
            )


class Profiler:
    """Collects what a program's kernels took, `begin` and `end` around each step. Steps of like size share a table."""

    def __init__(self, program: Program, limits: MachineLimits, packed: bool) -> None:
        self._program = program
        self._limits = limits
        self._packed = packed
        self._sizes: dict[str, Work] = {}
        self._size = ""
        self._reported = time.monotonic()
        program.set_profiling(True)
        program.reset_profile()
        text = f"limits of {limits.threads} threads: {limits.read_gb_s:.1f} GB/s read, "
        log.info(text + f"{limits.byte_gmac_s:.0f} GMAC/s of bytes, {limits.float_gmac_s:.0f} GMAC/s of float32")

    def begin(self, rows: int) -> None:
        """A step of `rows` is about to run: the kernels' sums so far belong to the size before."""
        size = size_of(rows)
        if size != self._size:
            self._collect()
            self._size = size
        work = self._sizes.setdefault(size, Work())
        work.steps += 1
        work.rows += rows

    def end(self, seconds: float) -> None:
        """It has been run, in so many seconds of native code."""
        self._sizes[self._size].seconds += seconds
        if time.monotonic() - self._reported > SECONDS_BETWEEN_REPORTS:
            self.report()

    def report(self) -> None:
        """Log the tables of what was done since the last report, if anything was."""
        self._collect()
        for size, work in self._sizes.items():
            mean = 1e3 * work.seconds / work.steps
            event(log, logging.INFO, f"steps of {size}", steps=work.steps, rows=work.rows, ms_per_step=round(mean, 3))
            for line in table(work, self._limits, self._packed):
                log.info("    %s", line)
        self._sizes.clear()
        self._size = ""
        self._reported = time.monotonic()

    def _collect(self) -> None:
        if self._size:
            self._sizes.setdefault(self._size, Work()).add(self._program.profile())
        self._program.reset_profile()


def size_of(rows: int) -> str:
    """`1 row`, `2-8 rows` … `over 128 rows`."""
    if rows <= 1:
        return "1 row"
    for least, most in pairwise(SIZES):
        if rows <= most:
            return f"{least + 1}-{most} rows"
    return f"over {SIZES[-1]} rows"


def table(work: Work, limits: MachineLimits, packed: bool) -> list[str]:
    """Aligned lines: a head, the kernels from the longest on, and what the steps' time holds besides them."""
    kernels = sorted(work.kernels.values(), key=lambda kernel: -kernel.seconds)
    rest = work.seconds - sum(kernel.seconds for kernel in kernels)
    rows = [HEAD, *(line(kernel, work, limits, packed) for kernel in kernels)]
    rows.append(("between kernels", "", f"{1e3 * rest / work.steps:.3f}", share(rest, work.seconds), "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def line(kernel: OperationProfile, work: Work, limits: MachineLimits, packed: bool) -> tuple[str, ...]:
    """One kernel's cells. Products of a packed model, also those of experts, multiply bytes, attention floats."""
    bytewise = packed and kernel.name.startswith(("matmul", "experts"))
    peak = limits.byte_gmac_s if bytewise else limits.float_gmac_s
    seconds = kernel.seconds or 1e-9
    read, macs = kernel.bytes / seconds / 1e9, kernel.macs / seconds / 1e9
    return (
        kernel.name,
        f"{kernel.calls / work.steps:.0f}",
        f"{1e3 * kernel.seconds / work.steps:.3f}",
        share(kernel.seconds, work.seconds),
        *((f"{read:.1f}", share(read, limits.read_gb_s)) if kernel.bytes else ("", "")),
        *((f"{macs:.1f}", share(macs, peak)) if kernel.macs else ("", "")),
    )


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""
