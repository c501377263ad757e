"""Mixtures of experts: a router sends each row to a few of many gated MLPs. Shazeer et al. 2017; Jiang et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from textmill.kernels import dispatch
from textmill.kernels.native import plain
from textmill.kernels.spec import ExpertsSpec
from textmill.layers.linear import Canonical, Linear, Matrix, join, joined, matrix, share
from textmill.layers.types import Hidden, hidden
from textmill.parallel.group import Group
from textmill.weights.view import View


@dataclass(frozen=True, slots=True)
class Experts:
    """Every expert's [gate; up] and down; of ranks each holds a part of all experts' inner numbers."""

    gate_up: Sequence[Matrix]
    down: Sequence[Matrix]
    group: Group


class MoE:
    """Sum over a row's `top_k` experts of weight x down(act(gate(x)) x up(x)); `norm`: see kernels.spec.ExpertsSpec."""

    def __init__(
        self, router: Linear, experts: Experts, *, top_k: int, activation: str, norm: float | None = 1.0
    ) -> None:
        self.router = router
        self.experts = experts
        self.spec = ExpertsSpec(top_k, activation, norm)

    def __call__(self, x: Hidden) -> Hidden:
        own = self.experts
        gate_up = [matrix.form_for(x) for matrix in own.gate_up]
        down = [matrix.form_for(x) for matrix in own.down]
        return own.group.all_reduce(hidden(dispatch.experts(x, self.router(x), gate_up, down, self.spec)))


def experts(w: View, count: int, gate: str, up: str, down: str) -> Experts:
    """Experts under their numbers, each with three matrices of its own."""
    views = [w / number for number in range(count)]
    inner = share(w, (views[0] / gate).shape("weight")[0])
    return Experts(
        [joined([view / gate, view / up], [inner, inner]) for view in views],
        [matrix(view / down, inputs=inner) for view in views],
        w.group,
    )


def fused_experts(w: View, count: int, gate_up: str, down: str) -> Experts:
    """Experts stacked in two tensors: [experts, gate and up, inputs] and [experts, outputs, inner numbers]."""
    total = w.shape(down)[2]
    inner = np.array(share(w, total) or range(total))
    both = np.concatenate([inner, inner + total])

    def up_of(number: int) -> Canonical:
        stored: NDArray[np.float32] = plain(w.tensor(gate_up, range(number, number + 1))[0], np.float32)
        part: NDArray[np.float32] = stored[both]
        return part

    def down_of(number: int) -> Canonical:
        stored: NDArray[np.float32] = plain(w.tensor(down, range(number, number + 1))[0], np.float32)
        part: NDArray[np.float32] = stored[:, inner]
        return part

    return Experts(
        [Matrix(w.path(gate_up), partial(up_of, number)) for number in range(count)],
        [Matrix(w.path(down), partial(down_of, number)) for number in range(count)],
        w.group,
    )


def rowwise_experts(w: View, count: int, gate: str, up: str, down: str) -> Experts:
    """Experts one below the other in three matrices [experts x inner numbers, k]; `down` is stored transposed."""
    total = w.shape(gate)[0] // count
    inner = share(w, total) or range(total)
    turned = w.transpose()

    def rows(number: int) -> range:
        return range(number * total + inner.start, number * total + inner.stop)

    def up_of(number: int) -> Canonical:
        return join([w.matrix(name, rows(number)) for name in (gate, up)])

    def down_of(number: int) -> Canonical:
        return turned.matrix(down, None, rows(number))

    return Experts(
        [Matrix(w.path(gate), partial(up_of, number)) for number in range(count)],
        [Matrix(w.path(down), partial(down_of, number)) for number in range(count)],
        w.group,
    )
