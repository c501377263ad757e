"""Linear layers: a stored matrix, read from the checkpoint at first use, times rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.kernels import dispatch
from textmill.kernels.native import NativeWeight, Rows, dense_weight, pack_weight, plain
from textmill.kernels.spec import Array
from textmill.layers.types import Hidden, hidden
from textmill.quant.packed import Packed
from textmill.weights.view import View

Canonical: TypeAlias = "Packed | Array"


class Matrix:
    """One weight matrix [outputs, inputs] that is read once, when first needed, in the form its user asks for.

    Recorded programs take it packed for the native kernels; torch takes a float tensor or a `Packed`.
    """

    def __init__(self, name: str, read: Callable[[], Canonical]) -> None:
        self.name = name
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

    def rows(self, numbers: NDArray[np.int64]) -> Matrix:
        """The matrix of these rows of this one, in this order."""
        return Matrix(self.name, lambda: taken(self._read(), numbers))

    def form_for(self, x: Hidden | None) -> NativeWeight | Canonical:
        """The form that multiplies rows like `x`; None stands for a recording."""
        return self.native() if x is None or isinstance(x, Rows) else self.plain()


def taken(matrix: Canonical, rows: NDArray[np.int64]) -> Canonical:
    return matrix.take(rows) if isinstance(matrix, Packed) else matrix[rows]


def to_native(matrix: Canonical) -> NativeWeight:
    if isinstance(matrix, Packed):
        return pack_weight(matrix.codes, matrix.scales, matrix.offsets, matrix.zero, matrix.bits, matrix.group)
    return dense_weight(matrix)


class Linear:
    """y = x W^T (+ bias)."""

    def __init__(self, matrix: Matrix, bias: Array | None = None) -> None:
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: Hidden) -> Hidden:
        return hidden(dispatch.matmul(x, self.matrix.form_for(x), bias=self.bias))


def matrix(w: View) -> Matrix:
    """The matrix `weight` under a prefix."""
    return Matrix(w.name, lambda: w.matrix("weight"))


def joined(views: Sequence[View]) -> Matrix:
    """Several matrices over the same input, stacked along their outputs into one."""
    if len(views) == 1:
        return matrix(views[0])
    name = "+".join(view.name for view in views)
    return Matrix(name, lambda: join([view.matrix("weight") for view in views]))


def join(parts: Sequence[Canonical]) -> Canonical:
    if all(isinstance(part, Packed) for part in parts):
        return Packed.join([part for part in parts if isinstance(part, Packed)])
    dense = [part.dequantize() if isinstance(part, Packed) else part for part in parts]
    return np.concatenate([plain(part, np.float32) for part in dense])


def bias(views: Sequence[View]) -> Array | None:
    """The biases of several matrices, joined; either all have one or none."""
    found = [view.has("bias") for view in views]
    if not any(found):
        return None
    if not all(found):
        missing = views[found.index(False)].name
        raise ModelError(f"{missing} has no bias, but its siblings have one")
    return np.concatenate([plain(view.tensor("bias"), np.float32) for view in views])


def column(w: View, *names: str) -> Linear:
    """Outputs of one or more matrices side by side (cut by outputs between ranks)."""
    views = [w / name for name in names]
    return Linear(joined(views), bias(views))


def row(w: View, name: str) -> Linear:
    """A matrix whose inputs are what a rank holds (cut by inputs, summed between ranks)."""
    return Linear(matrix(w / name), bias([w / name]))
