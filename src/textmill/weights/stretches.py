"""Rows of a stored matrix as the few stretches that must be read for them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = "range | NDArray[np.int64]"
# Of more pieces than this, the one stretch that covers them is read if at least half of it is wanted.
FEW = 8
MANY = 1024  # and of more than this in any case


def stretches(wanted: Indices) -> tuple[list[range], NDArray[np.int64] | None]:
    """Ranges to read one after the other, and which of what was read to take (None: all of it, in order)."""
    if isinstance(wanted, range):
        return [wanted], None
    edges = np.flatnonzero(np.diff(wanted) != 1) + 1
    if len(edges) >= FEW:
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if len(edges) >= MANY or 2 * len(wanted) >= high - low:
            return [range(low, high)], wanted - low
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(wanted)]])
    return [range(int(wanted[a]), int(wanted[b - 1]) + 1) for a, b in zip(starts, ends, strict=True)], None


def composed(outer: NDArray[np.int64] | None, inner: Indices | None) -> Indices | None:
    """Rows `inner` of the matrix whose rows are rows `outer` of the stored one; None is all, in order."""
    if outer is None or inner is None:
        return inner if outer is None else outer
    return outer[inner.start : inner.stop] if isinstance(inner, range) else outer[inner]
