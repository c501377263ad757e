"""Prints what this machine can give at most: read bandwidth, byte products and float products, on one core and on all.

The probe is the one that `textmill launch --profile` holds kernels against (kernels/cpu/machine_limits.cpp). `--json`
prints the figures as one JSON list.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from textmill.kernels.limits import machine_limits
from textmill.kernels.native import instruction_set, set_threads

ROWS = (
    ("read_1gib_gb_s", "read bandwidth, 1 GiB buffer", "GB/s"),
    ("read_96mib_gb_s", "read bandwidth, 96 MiB buffer", "GB/s"),
    ("byte_products_gmac_s", "unsigned x signed byte products", "GMAC/s"),
    ("fma_gmac_s", "float32 products (FMA)", "GMAC/s"),
)


def measure(threads: int, seconds: float) -> dict[str, float]:
    """The figures of so many threads."""
    count = set_threads(threads)
    large, small = (machine_limits(seconds, megabytes) for megabytes in (1024, 96))
    return {
        "threads": count,
        "read_1gib_gb_s": round(large.read_gb_s, 1),
        "read_96mib_gb_s": round(small.read_gb_s, 1),
        "byte_products_gmac_s": round(max(large.byte_gmac_s, small.byte_gmac_s), 1),
        "fma_gmac_s": round(max(large.float_gmac_s, small.float_gmac_s), 1),
    }


def table(runs: list[dict[str, float]]) -> str:
    """The figures, one row a limit and one column a run."""
    lines = [f"{instruction_set():38}" + "".join(f"{int(run['threads']):>5} threads" for run in runs) + "  unit"]
    for key, title, unit in ROWS:
        lines.append(f"{title:38}" + "".join(f"{run[key]:>13.1f}" for run in runs) + f"  {unit}")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure")
    options = parser.parse_args()
    runs = [measure(count, options.seconds) for count in sorted({1, len(os.sched_getaffinity(0))})]
    print(json.dumps(runs) if options.json else table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
