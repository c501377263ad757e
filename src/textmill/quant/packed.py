"""Packed: a stored matrix as integer codes in groups along its inputs; every quantization scheme becomes one of these.

w[o, i] = scales[o, g] * (codes[o, i] - zero) + offsets[o, g]        g = i // group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix [n outputs, k inputs]: codes uint8 [n, k], scales float32 [n, k / group], offsets the same or None.

    `bits` is 4 (codes up to 15) or 8 (codes up to 255); `zero` is the code that stands for the value `offset`.
    """

    codes: Codes
    scales: Floats
    offsets: Floats | None
    zero: int
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share one scale and one offset."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    @property
    def layout(self) -> tuple[int, int, int, bool]:
        """What must be equal for two matrices to lie in one without re-expressing: bits, group, zero, offsets."""
        return self.bits, self.group, self.zero, self.offsets is not None

    def take(self, rows: Rows) -> Packed:
        """The rows with these numbers, in this order."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Packed(self.codes[rows], self.scales[rows], offsets, self.zero, self.bits)

    def cut(self, dim: int, start: int, stop: int) -> Packed:
        """Rows (dim 0) or inputs (dim 1) [start, stop); inputs can be cut only between groups (ValueError)."""
        if dim == 0:
            return self.take(np.arange(start, stop))
        if start % self.group or stop % self.group:
            raise ValueError(f"inputs {start}:{stop} do not fall between groups of {self.group}")
        groups = slice(start // self.group, stop // self.group)
        offsets = None if self.offsets is None else np.ascontiguousarray(self.offsets[:, groups])
        codes = np.ascontiguousarray(self.codes[:, start:stop])
        return Packed(codes, np.ascontiguousarray(self.scales[:, groups]), offsets, self.zero, self.bits)

    @staticmethod
    def join(parts: Sequence[Packed]) -> Packed:
        """Stacks matrices over the same inputs; differing layouts are first re-expressed in a common one, exactly."""
        if len({part.layout for part in parts}) > 1:
            parts = _common(parts)
        offsets = [part.offsets for part in parts if part.offsets is not None]
        return Packed(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(offsets) if offsets else None,
            parts[0].zero,
            parts[0].bits,
        )

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] times this matrix's transpose, x rounded to 8 bits per chunk of 32 as the kernels do: [..., n]."""
        from textmill.kernels import reference

        return reference.matmul(x, self)

    def dequantize(self) -> Floats:
        """The matrix in float32 [n, k]."""
        codes = (self.codes.astype(np.float32) - np.float32(self.zero)).reshape(*self.scales.shape, self.group)
        grouped = codes * self.scales[:, :, None]
        if self.offsets is not None:
            grouped += self.offsets[:, :, None]
        return grouped.reshape(self.shape)


def _common(parts: Sequence[Packed]) -> list[Packed]:
    """The same matrices in one layout that holds them all: the finest group, the largest zero, offsets if any has."""
    group = gcd(*(part.group for part in parts))
    zero = max(part.zero for part in parts)
    largest = max(int(part.codes.max()) + zero - part.zero for part in parts)
    if largest > 255:
        raise ValueError(f"these matrices have no common layout of 8 bits: {[part.layout for part in parts]}")
    bits = 4 if largest < 16 and all(part.bits == 4 for part in parts) else 8
    offsets = any(part.offsets is not None for part in parts)
    return [_express(part, bits, group, zero, offsets) for part in parts]


def _express(part: Packed, bits: int, group: int, zero: int, with_offsets: bool) -> Packed:
    repeat = part.group // group
    scales = np.repeat(part.scales, repeat, axis=1)
    offsets = None
    if with_offsets:
        offsets = np.zeros_like(scales) if part.offsets is None else np.repeat(part.offsets, repeat, axis=1)
    return Packed(part.codes + np.uint8(zero - part.zero), scales, offsets, zero, bits)
