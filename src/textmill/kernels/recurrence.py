"""The meaning of operations whose state moves on with every token, in torch; states are written in place.

`work`: (slot, start, count), the rows of each slot one after the other. Every row's arithmetic is the same whatever
stands beside it in a step and however its sequence was cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from textmill.kernels.reference import floats
from textmill.kernels.spec import ConvolutionSpec, ScanSpec

Work = Sequence[tuple[int, int, int]]
SCAN_ROWS = 64  # whose states are in memory at once: [rows, channels, columns]


def convolve(x: torch.Tensor, states: torch.Tensor, work: Work, spec: ConvolutionSpec) -> torch.Tensor:
    """x [rows, channels or more] (the first are taken), states [slots, channels, width - 1]: [rows, channels]."""
    weight = floats(spec.weight)
    channels = len(weight)
    x = x[:, :channels].float()
    if all(count == 1 for _, _, count in work):
        slots = [slot for slot, _, _ in work]
        seen = torch.cat((states[slots], x.unsqueeze(-1)), -1)
        states[slots] = seen[..., 1:]
        y = (seen * weight).sum(-1)
    else:
        y = torch.cat([_convolve_one(own, states[slot], weight) for slot, own in _rows_of(x, work)])
    return F.silu(y if spec.bias is None else y + floats(spec.bias))


def _convolve_one(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    width = weight.shape[1]
    seen = torch.cat((state, x.T), -1)
    state.copy_(seen[:, seen.shape[1] - width + 1 :])
    windows = seen.unfold(-1, width, 1).transpose(0, 1).contiguous()  # [rows, channels, width]
    return (windows * weight).sum(-1)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    bc: torch.Tensor,
    gate: torch.Tensor,
    states: torch.Tensor,
    work: Work,
    spec: ScanSpec,
) -> torch.Tensor:
    """x, dt [rows, channels], bc [rows, 2 columns], gate [rows, channels or more] (the last are taken).

    states: [slots, channels, columns]. Returns [rows, channels].
    """
    dt = F.softplus(dt.float())
    b, c = bc.float().chunk(2, dim=-1)
    a, skip, pushed = floats(spec.a), floats(spec.skip), dt * x
    if all(count == 1 for _, _, count in work):
        slots = [slot for slot, _, _ in work]
        state = _decay(dt, a) * states[slots] + _push(pushed, b)
        states[slots] = state
        y = _read(state, c)
    else:
        y = torch.empty_like(x)
        first = 0
        for slot, _, count in work:
            for begin in range(first, first + count, SCAN_ROWS):
                rows = slice(begin, min(begin + SCAN_ROWS, first + count))
                y[rows] = _read(_scan_one(_decay(dt[rows], a), _push(pushed[rows], b[rows]), states[slot]), c[rows])
            first += count
    return (y + skip * x) * F.silu(gate[:, -x.shape[1] :].float())


def _decay(dt: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """What remains of the states at each row: [rows, channels, columns]."""
    return torch.exp(dt.unsqueeze(-1) * a)


def _push(pushed: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What each row adds to the states: [rows, channels, columns]."""
    return pushed.unsqueeze(-1) * b.unsqueeze(1)


def _read(states: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """[rows, channels]"""
    return (states * c.unsqueeze(1)).sum(-1)


def _scan_one(decay: torch.Tensor, push: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The states after each row, in the memory of `decay`; the last one also goes to `state`."""
    before = state
    for remains, added in zip(decay, push, strict=True):
        before = remains.mul_(before).add_(added)
    state.copy_(before)
    return decay


def _rows_of(x: torch.Tensor, work: Work) -> list[tuple[int, torch.Tensor]]:
    parts = torch.split(x, [count for _, _, count in work])
    return [(slot, own) for (slot, _, _), own in zip(work, parts, strict=True)]
