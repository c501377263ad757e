"""Prints what this machine can give at most: read bandwidth, byte products and float products, on one core and on all.

Builds limits.cpp with the C++ compiler found (CXX, else g++) and runs it. `--json` prints the figures as one JSON list.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = (
    ("read_1gib_gb_s", "read bandwidth, 1 GiB buffer", "GB/s"),
    ("read_96mib_gb_s", "read bandwidth, 96 MiB buffer", "GB/s"),
    ("byte_products_gmac_s", "byte products (vpmaddubsw + vpaddw)", "GMAC/s"),
    ("fma_gmac_s", "float32 products (FMA)", "GMAC/s"),
)


def build(folder: Path) -> Path:
    """Compiles the measuring program into `folder`."""
    program = folder / "limits"
    source = Path(__file__).with_name("limits.cpp")
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", "-O2", "-pthread", str(source), "-o", str(program)], check=True)
    return program


def measure(program: Path, threads: int, seconds: float) -> dict[str, float]:
    """One run of the program with so many threads."""
    command = [str(program), str(threads), str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def table(runs: list[dict[str, float]]) -> str:
    """The figures, one row a limit and one column a run."""
    lines = [f"{'limit':38}" + "".join(f"{int(run['threads']):>5} threads" for run in runs) + "  unit"]
    for key, title, unit in ROWS:
        lines.append(f"{title:38}" + "".join(f"{run[key]:>13.1f}" for run in runs) + f"  {unit}")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure")
    options = parser.parse_args()
    threads = sorted({1, len(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        runs = [measure(program, count, options.seconds) for count in threads]
    print(json.dumps(runs) if options.json else table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
