"""Convolution and scan: their formulas, and the same bits however a sequence is cut and whoever stands beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from textmill.kernels import recurrence
from textmill.kernels.spec import ConvolutionSpec, ScanSpec

# Whole vectors: torch computes what is left over of them by other functions.
CHANNELS, COLUMNS, WIDTH, ROWS = 32, 8, 4, 150
GENERATOR = torch.Generator().manual_seed(3)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


CONVOLUTION = ConvolutionSpec(normal(CHANNELS, WIDTH), normal(CHANNELS))
SCAN = ScanSpec(-normal(CHANNELS, COLUMNS).exp(), normal(CHANNELS))
X, DT, BC = normal(3, ROWS, 2 * CHANNELS), normal(3, ROWS, CHANNELS), normal(3, ROWS, 2 * COLUMNS)


def computed(steps: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """Both operations over steps of (sequence, count): [sequences, rows, channels]. Sequence i is in slot 2 - i."""
    inputs, states = torch.zeros(3, CHANNELS, WIDTH - 1), torch.zeros(3, CHANNELS, COLUMNS)
    out, done = torch.zeros(3, ROWS, CHANNELS), [0, 0, 0]
    for step in steps:
        work = [(2 - i, done[i], count) for i, count in step]
        x, dt, bc = (torch.cat([rows[i, done[i] : done[i] + n] for i, n in step]) for rows in (X, DT, BC))
        inner = recurrence.convolve(x, inputs, work, CONVOLUTION)
        y = recurrence.scan(inner, dt, bc, x, states, work, SCAN)
        for (i, count), own in zip(step, torch.split(y, [count for _, count in step]), strict=True):
            out[i, done[i] : done[i] + count] = own
            done[i] += count
    return out


def by_formula(sequence: int) -> torch.Tensor:
    x, dt, bc = X[sequence].double(), DT[sequence].double(), BC[sequence].double()
    weight, bias = torch.as_tensor(CONVOLUTION.weight).double(), torch.as_tensor(CONVOLUTION.bias).double()
    a, skip = torch.as_tensor(SCAN.a).double(), torch.as_tensor(SCAN.skip).double()
    h = torch.zeros(CHANNELS, COLUMNS, dtype=torch.float64)
    out = []
    for t in range(ROWS):
        taps = [weight[:, WIDTH - 1 - back] * x[t - back, :CHANNELS] for back in range(min(WIDTH, t + 1))]
        u = torch.nn.functional.silu(bias + sum(taps))
        step = torch.nn.functional.softplus(dt[t])
        b, c = bc[t, :COLUMNS], bc[t, COLUMNS:]
        h = torch.exp(step[:, None] * a) * h + (step * u)[:, None] * b
        out.append((h @ c + skip * u) * torch.nn.functional.silu(x[t, CHANNELS:]))
    return torch.stack(out)


def test_the_formula() -> None:
    found = computed([[(i, ROWS)] for i in range(3)])
    for i in range(3):
        torch.testing.assert_close(found[i].double(), by_formula(i), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "steps",
    [
        [[(i, 1)] for i in range(3) for _ in range(ROWS)],
        [[(0, 1), (1, 1), (2, 1)]] * ROWS,
        [[(0, 37), (2, 1)], [(2, 100), (1, 3), (0, 1)], [(0, ROWS - 38), (1, ROWS - 3), (2, ROWS - 101)]],
    ],
    ids=["token by token", "side by side", "in uneven chunks"],
)
def test_the_same_bits_however_it_is_cut(steps: Sequence[Sequence[tuple[int, int]]]) -> None:
    assert torch.equal(computed(steps), computed([[(i, ROWS)] for i in range(3)]))
