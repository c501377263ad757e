"""The thread pool: other threads go on while it works, programs may run side by side, a fork starts anew."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.tiny import Tiny, put, work
from textmill.kernels import native


def busy_program() -> tuple[object, np.ndarray]:
    p = Tiny(width=256, heads=8, kv_heads=4, head_dim=32, hidden=1024, layers=6).program(blocks=60)
    put(p, 0, [1] * 290)
    return p, work((0, 0, 290, 0))


def test_python_goes_on_during_a_step() -> None:
    p, items = busy_program()
    native.set_threads(1)
    p.logits(items)
    steps: list[tuple[float, float]] = []

    def run() -> None:
        for _ in range(8):
            begin = time.perf_counter()
            p.logits(items)
            steps.append((begin, time.perf_counter()))

    worker = threading.Thread(target=run)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    native.set_threads(0)
    inside = [sum(begin < tick < end for tick in ticks) for begin, end in steps]
    longest = max(end - begin for begin, end in steps)
    assert longest > 0.002, "the step is too short to tell"
    assert max(inside) >= 2


@pytest.mark.parametrize("count", [1, 2, 7])
def test_programs_side_by_side(count: int) -> None:
    models = [Tiny(seed=seed, packed=seed == 1) for seed in range(3)]
    programs = [model.program() for model in models]
    native.set_threads(count)
    items = work((0, 0, 40, 1))
    for p in programs:
        put(p, 0, list(range(40)))
    expected = [p.logits(items, every_row=True) for p in programs]
    wrong: list[int] = []

    def run(index: int) -> None:
        for _ in range(60):
            if not np.array_equal(programs[index].logits(items, every_row=True), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=run, args=(index,)) for index in (0, 1, 2, 0)]
    for worker in workers:
        worker.start()
    for size in (2, 3, 1, count):
        native.set_threads(size)
        time.sleep(0.005)
    for worker in workers:
        worker.join()
    native.set_threads(0)
    assert wrong == []


FORK = """
import os, numpy as np
from tests.kernels.tiny import Tiny, put, work
from textmill.kernels import native
native.set_threads(3)
p = Tiny().program()
put(p, 0, list(range(60)))
before = p.logits(work((0, 0, 60, 1)), every_row=True)
child = os.fork()
after = p.logits(work((0, 0, 60, 1)), every_row=True)
same = np.array_equal(before, after)
if child == 0:
    os._exit(0 if same else 3)
assert same
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
print("both")
"""


def test_a_forked_child_has_threads_of_its_own() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False, cwd=root
    )
    assert done.stdout.strip() == "both", done.stderr
