"""The operations that layers call: torch tensors take the torch reference, `Rows` are recorded in their native program.

This is the only place that asks which platform it is on. Torch is imported only where a tensor is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from textmill.kernels import native
from textmill.kernels.native import NativeWeight, Rows
from textmill.kernels.spec import Array, ExpertsSpec, PackedMatrix

if TYPE_CHECKING:
    import torch

Values: TypeAlias = "torch.Tensor | Rows"
Matrix: TypeAlias = "Array | PackedMatrix | NativeWeight"


def native_available() -> bool:
    """True if the native kernels were built for this Python."""
    return native.LOADED


def instruction_set() -> str:
    """What the native kernels run with on this machine: "avx512vnni", "avx2" or "portable"; "torch" without them."""
    return native.instruction_set() if native.LOADED else "torch"


def rms_norm(x: Values, weight: Array, eps: float, plus_one: bool = False) -> Values:
    """x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight)."""
    if isinstance(x, Rows):
        return x.program.rms_norm(x, weight, eps, plus_one)
    from textmill.kernels import reference

    return reference.rms_norm(x, weight, eps, plus_one)


def layer_norm(x: Values, weight: Array, bias: Array | None, eps: float) -> Values:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    if isinstance(x, Rows):
        return x.program.layer_norm(x, weight, bias, eps)
    from textmill.kernels import reference

    return reference.layer_norm(x, weight, bias, eps)


def matmul(
    x: Values,
    matrix: Matrix,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> Values:
    """x W^T + bias, then the activation; `gated`: W is [gate; up], the result act(gate) * up and half as wide.

    Rows take a NativeWeight, tensors a tensor [n, k] or a PackedMatrix.
    """
    if isinstance(x, Rows):
        if not isinstance(matrix, NativeWeight):
            raise TypeError(f"a recorded product needs a NativeWeight, not {type(matrix).__name__}")
        return x.program.matmul(x, matrix, bias=bias, activation=activation, gated=gated)
    if isinstance(matrix, NativeWeight):
        raise TypeError("a NativeWeight multiplies recorded Rows, not tensors")
    from textmill.kernels import reference

    return reference.matmul(x, matrix, bias=bias, activation=activation, gated=gated)


def experts(x: Values, scores: Values, gate_up: Sequence[Matrix], down: Sequence[Matrix], spec: ExpertsSpec) -> Values:
    """The sum of the experts that each row is sent to (see ExpertsSpec): x, result [rows, k], scores [rows, experts].

    Matrices per expert: `gate_up` [gate; up] and `down`; Rows take NativeWeights, tensors the other forms.
    """
    if isinstance(x, Rows) and isinstance(scores, Rows):
        return x.program.experts(x, scores, native_forms(gate_up), native_forms(down), spec)
    from textmill.kernels import reference

    if isinstance(x, Rows) or isinstance(scores, Rows):
        raise TypeError("experts take tensors or recorded Rows, not both")
    return reference.experts(x, scores, plain_forms(gate_up), plain_forms(down), spec)


def native_forms(matrices: Sequence[Matrix]) -> list[NativeWeight]:
    native = [matrix for matrix in matrices if isinstance(matrix, NativeWeight)]
    if len(native) != len(matrices):
        raise TypeError("recorded Rows are multiplied by NativeWeights")
    return native


def plain_forms(matrices: Sequence[Matrix]) -> list[Array | PackedMatrix]:
    plain = [matrix for matrix in matrices if not isinstance(matrix, NativeWeight)]
    if len(plain) != len(matrices):
        raise TypeError("a NativeWeight multiplies recorded Rows, not tensors")
    return plain


def add(x: Values, y: Values) -> Values:
    """x + y, both tensors or both recorded (TypeError)."""
    if isinstance(x, Rows) and isinstance(y, Rows):
        return x.program.add(x, y)
    if isinstance(x, Rows) or isinstance(y, Rows):
        raise TypeError("a tensor and recorded Rows cannot be added")
    return x + y


def scale(x: Values, factor: float) -> Values:
    """x * factor."""
    if isinstance(x, Rows):
        return x.program.scale(x, factor)
    return x * factor


def clip(x: Values, limit: float) -> Values:
    """x, but no more than `limit` and no less than -limit."""
    if isinstance(x, Rows):
        return x.program.clip(x, limit)
    return x.clamp(-limit, limit)


def softcap(x: Values, cap: float) -> Values:
    """cap * tanh(x / cap)."""
    if isinstance(x, Rows):
        return x.program.softcap(x, cap)
    from textmill.kernels import reference

    return reference.softcap(x, cap)


def activation(x: Values, name: str) -> Values:
    """The function called `name` of every element."""
    if isinstance(x, Rows):
        return x.program.activation(x, name)
    from textmill.kernels import reference

    return reference.activation(x, name)


def gated_activation(x: Values, name: str) -> Values:
    """activation(first half of the columns) * second half."""
    if isinstance(x, Rows):
        return x.program.gated_activation(x, name)
    from textmill.kernels import reference

    return reference.gated_activation(x, name)
