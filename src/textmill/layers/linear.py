"""Linear layers: a stored matrix, read from the checkpoint at first use, times rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.kernels import dispatch
from textmill.kernels.native import NativeWeight, Rows, dense_weight, pack_weight, plain
from textmill.kernels.spec import CHUNK, Array
from textmill.layers.types import Hidden, hidden
from textmill.parallel.group import ALONE, Group
from textmill.quant.packed import Packed
from textmill.weights.stretches import Indices
from textmill.weights.view import View

Canonical: TypeAlias = "Packed | Array"


class Matrix:
    """One weight matrix [outputs, inputs] that is read once, when first needed, in the form its user asks for.

    Recorded programs take it packed for the native kernels; torch takes a float tensor or a `Packed`. `part` says
    which rows of a table these are, where a rank holds only some.
    """

    def __init__(self, name: str, read: Callable[[], Canonical], part: range | None = None) -> None:
        self.name = name
        self.part = part
        self._read = read
        self._native: NativeWeight | None = None
        self._plain: Canonical | None = None

    def native(self) -> NativeWeight:
        if self._native is None:
            self._native = to_native(self._read())
        return self._native

    def plain(self) -> Canonical:
        if self._plain is None:
            self._plain = self._read()
        return self._plain

    def changed(self, change: Callable[[Canonical], Canonical]) -> Matrix:
        """What `change` makes of this matrix when it is read; of as many rows."""
        return Matrix(self.name, lambda: change(self._read()), self.part)

    def form_for(self, x: Hidden | None) -> NativeWeight | Canonical:
        """The form that multiplies rows like `x`; None stands for a recording."""
        return self.native() if x is None or isinstance(x, Rows) else self.plain()


def unit_rows(matrix: Canonical) -> Canonical:
    """Every row divided by its length."""
    dense = matrix.dequantize() if isinstance(matrix, Packed) else plain(matrix, np.float32)
    factors: NDArray[np.float32] = 1 / np.linalg.norm(dense, axis=1, keepdims=True).clip(1e-12)
    if not isinstance(matrix, Packed):
        normed: NDArray[np.float32] = dense * factors
        return normed
    return replace(
        matrix, scales=matrix.scales * factors, offsets=None if matrix.offsets is None else matrix.offsets * factors
    )


def to_native(matrix: Canonical) -> NativeWeight:
    if isinstance(matrix, Packed):
        return pack_weight(matrix.codes, matrix.scales, matrix.offsets, matrix.zero, matrix.bits, matrix.group)
    return dense_weight(matrix)


class Linear:
    """y = x W^T (+ bias), the outputs (if `group` has more than one rank) being this rank's."""

    def __init__(self, matrix: Matrix, bias: Array | None = None, group: Group = ALONE) -> None:
        self.matrix = matrix
        self.bias = bias
        self.group = group

    def __call__(self, x: Hidden) -> Hidden:
        return hidden(dispatch.matmul(x, self.matrix.form_for(x), bias=self.bias))


class Summed(Linear):
    """The same from this rank's inputs, summed over all ranks; one of them adds the bias."""

    def __call__(self, x: Hidden) -> Hidden:
        return self.group.all_reduce(super().__call__(x))


class Clipped(Linear):
    """What another layer gives, but no more than `limit` and no less than -limit."""

    def __init__(self, inner: Linear, limit: float) -> None:
        super().__init__(inner.matrix, inner.bias, inner.group)
        self.limit = limit

    def __call__(self, x: Hidden) -> Hidden:
        return hidden(dispatch.clip(super().__call__(x), self.limit))


def matrix(w: View, rows: Indices | None = None, inputs: range | None = None) -> Matrix:
    """The matrix `weight` under a prefix, or some rows (outputs) and inputs of it."""
    part = rows if isinstance(rows, range) else None
    return Matrix(w.name, lambda: w.matrix("weight", rows, inputs), part)


def joined(views: Sequence[View], rows: Sequence[Indices | None] | None = None) -> Matrix:
    """Several matrices over the same input (some rows of each), stacked along their outputs into one."""
    rows = rows or [None] * len(views)
    if len(views) == 1:
        return matrix(views[0], rows[0])
    name = "+".join(view.name for view in views)
    parts = list(zip(views, rows, strict=True))
    return Matrix(name, lambda: join([view.matrix("weight", wanted) for view, wanted in parts]))


def join(parts: Sequence[Canonical]) -> Canonical:
    if all(isinstance(part, Packed) for part in parts):
        return Packed.join([part for part in parts if isinstance(part, Packed)])
    dense = [part.dequantize() if isinstance(part, Packed) else part for part in parts]
    return np.concatenate([plain(part, np.float32) for part in dense])


def bias(views: Sequence[View], rows: Sequence[Indices | None] | None = None) -> Array | None:
    """The biases of several matrices (some rows of each), joined; either all have one or none."""
    found = [view.has("bias") for view in views]
    if not any(found):
        return None
    if not all(found):
        missing = views[found.index(False)].name
        raise ModelError(f"{missing} has no bias, but its siblings have one")
    parts = zip(views, rows or [None] * len(views), strict=True)
    return np.concatenate([plain(view.tensor("bias", wanted), np.float32) for view, wanted in parts])


def share(w: View, total: int) -> range | None:
    """This rank's part of `total` numbers between two matrices; None is all. Packed groups are not torn apart."""
    return None if w.group is ALONE else w.group.share(total, CHUNK if w.checkpoint.packed else 1)


def column(w: View, *names: str, halves: bool = False) -> Linear:
    """Outputs of one or more matrices side by side (cut by outputs between ranks).

    `halves`: one stored matrix that is two of them, one after the other.
    """
    views = [w / name for name in names]
    rows: list[Indices | None] = [share(w, view.shape("weight")[0]) for view in views]
    if halves and w.group is not ALONE:
        total = views[0].shape("weight")[0] // 2
        first = np.array(share(w, total))
        rows = [np.concatenate([first, first + total])]
    return Linear(joined(views, rows), bias(views, rows), w.group)


def row(w: View, name: str) -> Linear:
    """A matrix whose inputs are what a rank holds (cut by inputs, summed between ranks)."""
    w = w / name
    if w.group is ALONE:
        return Linear(matrix(w), bias([w]))
    inputs = share(w, w.shape("weight")[1])
    added = bias([w])
    return Summed(matrix(w, inputs=inputs), added if w.group.rank == 0 else None, w.group)


def replicated(w: View, *names: str) -> Linear:
    """Outputs of one or more matrices side by side, whole on every rank, over inputs that every rank holds."""
    views = [w / name for name in names]
    return Linear(joined(views), bias(views))
