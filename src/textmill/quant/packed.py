"""Packed: a stored matrix as integer codes in groups along its inputs; every quantization scheme becomes one of these.

w[o, i] = scales[o, g] * (codes[o, i] - zero) + offsets[o, g]        g = i // group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from textmill.kernels import reference


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix [n outputs, k inputs]: codes uint8 [n, k], scales float32 [n, k / group], offsets the same or None.

    `bits` is 4 (codes up to 15) or 8 (codes up to 255); `zero` is the code that stands for the value `offset`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    zero: int
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share one scale and one offset."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def layout(self) -> tuple[int, int, int, bool]:
        """What must be equal for two matrices to lie in one without re-expressing: bits, group, zero, offsets."""
        return self.bits, self.group, self.zero, self.offsets is not None

    def take(self, rows: torch.Tensor) -> Packed:
        """The rows with these numbers, in this order."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Packed(self.codes[rows], self.scales[rows], offsets, self.zero, self.bits)

    def cut(self, dim: int, start: int, stop: int) -> Packed:
        """Rows (dim 0) or inputs (dim 1) [start, stop); inputs can be cut only between groups (ValueError)."""
        if dim == 0:
            return self.take(torch.arange(start, stop))
        if start % self.group or stop % self.group:
            raise ValueError(f"inputs {start}:{stop} do not fall between groups of {self.group}")
        groups = slice(start // self.group, stop // self.group)
        offsets = None if self.offsets is None else self.offsets[:, groups].contiguous()
        codes = self.codes[:, start:stop].contiguous()
        return Packed(codes, self.scales[:, groups].contiguous(), offsets, self.zero, self.bits)

    @staticmethod
    def join(parts: Sequence[Packed]) -> Packed:
        """Stacks matrices over the same inputs; differing layouts are first re-expressed in a common one, exactly."""
        if len({part.layout for part in parts}) > 1:
            parts = _common(parts)
        offsets = [part.offsets for part in parts if part.offsets is not None]
        return Packed(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(offsets) if offsets else None,
            parts[0].zero,
            parts[0].bits,
        )

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] times this matrix's transpose, x rounded to 8 bits per chunk of 32 as the kernels do: [..., n]."""
        return reference.matmul(x, self)

    def dequantize(self) -> torch.Tensor:
        """The matrix in float32 [n, k]."""
        return reference.dequantize(self)


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
    scales = part.scales.repeat_interleave(repeat, 1)
    offsets = None
    if with_offsets:
        offsets = torch.zeros_like(scales) if part.offsets is None else part.offsets.repeat_interleave(repeat, 1)
    return Packed(part.codes + (zero - part.zero), scales, offsets, zero, bits)
