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
    a, skip = floats(spec.a), floats(spec.skip)
    dt = F.softplus(dt.float())
    b, c = bc.float().chunk(2, dim=-1)
    pushed = dt * x
    y = torch.empty_like(x)
    first = 0
    if all(count == 1 for _, _, count in work):
        slots = [slot for slot, _, _ in work]
        state = torch.exp(dt.unsqueeze(-1) * a) * states[slots] + pushed.unsqueeze(-1) * b.unsqueeze(1)
        states[slots] = state
        y = (state * c.unsqueeze(1)).sum(-1)
    else:
        for slot, _, count in work:
            state = states[slot]
            for row in range(first, first + count):
                state = torch.exp(dt[row].unsqueeze(-1) * a) * state + pushed[row].unsqueeze(-1) * b[row]
                y[row] = (state * c[row]).sum(-1)
            states[slot] = state
            first += count
    return (y + skip * x) * F.silu(gate[:, -x.shape[1] :].float())


def _rows_of(x: torch.Tensor, work: Work) -> list[tuple[int, torch.Tensor]]:
    parts = torch.split(x, [count for _, _, count in work])
    return [(slot, own) for (slot, _, _), own in zip(work, parts, strict=True)]
