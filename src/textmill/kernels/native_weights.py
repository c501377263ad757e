"""Matrices in the layout of the CPU kernels, and how they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from textmill.kernels.spec import Array

try:
    from textmill import _native
except ImportError:  # not built: the torch reference serves
    _native = None  # type: ignore[assignment]

LOADED = _native is not None


class NativeWeight:
    """A matrix [n outputs, k inputs] in the layout of the CPU kernels; never changes."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        return self.handle.n, self.handle.k

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return int(self.handle.nbytes)

    def row(self, index: int) -> NDArray[np.float32]:
        """One row as float32 [k]."""
        out = np.empty(self.shape[1], np.float32)
        if not 0 <= index < self.shape[0]:
            raise ValueError(f"row {index} of a matrix with {self.shape[0]} rows")
        self.handle.row(index, out)
        return out


def pack_weight(codes: Array, scales: Array, offsets: Array | None, zero: int, bits: int, group: int) -> NativeWeight:
    """A packed matrix: codes uint8 [n, k], scales and offsets float32 [n, k / group] (see spec.PackedMatrix)."""
    plain_codes = plain(codes, np.uint8)
    n, k = plain_codes.shape
    wanted = (n, k // group)
    parts = [plain(scales, np.float32), *([] if offsets is None else [plain(offsets, np.float32)])]
    if any(part.shape != wanted for part in parts) or k % group:
        raise ValueError(f"scales and offsets of a {n} x {k} matrix in groups of {group} must be {wanted}")
    return NativeWeight(
        _native.pack_weight(plain_codes, parts[0], parts[1] if offsets is not None else None, zero, bits, group)
    )


def dense_weight(values: Array) -> NativeWeight:
    """A float matrix [n, k], kept in float32."""
    return NativeWeight(_native.dense_weight(plain(values, np.float32)))


def ggml_unpack(
    kind: int, blocks: Any, n: int, k: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32] | None, int, int, int]:
    """Codes, scales, offsets (or None), zero, bits and group of a GGUF tensor's raw blocks, in parallel over rows.

    `kind` is ggml's type number, `blocks` any contiguous memory of bytes. ValueError if the type is not supported or
    the memory is not the right size for n x k.
    """
    layout = _native.ggml_layout(kind)
    if layout is None:
        raise ValueError(f"ggml type {kind} has no native reader")
    bits, group, zero, has_offsets = layout
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, k // group), np.float32)
    offsets = np.empty((n, k // group), np.float32) if has_offsets else None
    _native.ggml_unpack(kind, np.frombuffer(blocks, np.uint8), codes, scales, offsets)
    return codes, scales, offsets, zero, bits, group


def ggml_supported(kind: int) -> bool:
    """True if `ggml_unpack` reads ggml's type number `kind`."""
    return LOADED and _native.ggml_layout(kind) is not None


def plain(values: Array, dtype: type[np.generic]) -> NDArray[Any]:
    """Any array or tensor as contiguous numpy memory of `dtype`; copies only if it must."""
    array: NDArray[Any] = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    return np.ascontiguousarray(array, dtype=dtype)
