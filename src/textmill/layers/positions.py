"""Positions that are no rotation: a learned vector for each, or a penalty on distance (ALiBi)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.kernels.native import plain
from textmill.kernels.spec import Array
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Positions:
    """Row `position + offset` of a learned table, one per token, to be added to its embedding."""

    def __init__(self, w: View, offset: int = 0) -> None:
        self.table: Array = w.tensor("weight")
        self.offset = offset
        wanted = w.config.max_position_embeddings + offset
        if len(self.table) < wanted:
            raise ModelError(f"{w.path('weight')}: {len(self.table)} rows, but the config needs {wanted}")

    def __call__(self, ctx: Context) -> Hidden:
        return ctx.embed_positions(self.table, self.offset)


def alibi_slopes(heads: int, largest: float = 8.0) -> NDArray[np.float32]:
    """What each head loses per token of distance: 2^(-largest * i / n) for the i-th of n heads: [heads].

    Of heads that are no power of two, the first take the slopes of the power of two below; the others lie between,
    every second one of the power of two above. Press et al. 2021.
    """
    below = 1 << (heads.bit_length() - 1)
    return np.concatenate([_series(below, largest), _series(2 * below, largest)[::2][: heads - below]])


def alibi_slopes_of_next_power(heads: int, largest: float) -> NDArray[np.float32]:
    """The same series over the next power of two, every second slope first, cut to the heads there are: [heads]."""
    above = 1 << (heads - 1).bit_length()
    series = _series(above, largest)
    return series if above == heads else np.concatenate([series[1::2], series[::2]])[:heads]


def alibi_key_bias(heads: int, positions: int, head_dim: int) -> NDArray[np.float32]:
    """ALiBi in the rounding of a checkpoint trained on it: slope x position in bfloat16, scaled like the scores.

    [heads, positions]: added to the score of the key at that position.
    """
    slopes, places = (_bfloat16(values)[:, None] for values in (alibi_slopes(heads), np.arange(positions)))
    return _bfloat16(slopes * places.T) * np.float32(head_dim**-0.5)


def distance_bias(c: ModelConfig, w: View, *, both: bool) -> NDArray[np.float32]:
    """A learned bias per head and bucket of distances, spread out: [heads, distances] (see `AttentionSpec.relative`).

    `both` ways: by key minus query, from -(n - 1) to n - 1; else by query minus key, from 0. Raffel et al. 2020.
    """
    table: NDArray[np.float32] = plain(w.tensor("relative_attention_bias.weight"), np.float32)
    longest = int(c.real("relative_attention_max_distance") or 128)
    backward = np.arange(longest + 1)
    if not both:
        return np.ascontiguousarray(table[_buckets(backward, len(table), longest)].T)
    half = len(table) // 2  # keys behind the query, then those before it
    found = _buckets(backward, half, longest)
    return np.ascontiguousarray(table[np.concatenate([found[::-1], half + found[1:]])].T)


def _buckets(distance: NDArray[np.int64], count: int, longest: int) -> NDArray[np.int64]:
    """The first half of the buckets for a distance each, the others for ranges that grow up to `longest`."""
    exact = count // 2
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    growing = exact + (ratio / np.float32(np.log(longest / exact)) * np.float32(count - exact)).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(growing, count - 1))


def _series(count: int, largest: float) -> NDArray[np.float32]:
    """2^(-largest * i / count) for i = 1..count."""
    exponents = np.arange(1, count + 1, dtype=np.float64) * (largest / count)
    return np.exp2(-exponents).astype(np.float32)


def _bfloat16(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Rounded to bfloat16 (nearest, ties to even), kept in float32."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
