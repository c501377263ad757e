"""Rotary position tables: cos and sin of every position, with the published ways to stretch them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.kernels.native import plain
from textmill.kernels.spec import Array
from textmill.weights.config import ModelConfig

Floats = NDArray[np.float32]


class Rope:
    """Tables `cos`, `sin`: float32 [positions, rotary_dim / 2]; pairs are (x[i], x[i + d/2]) unless `interleaved`.

    `theta` replaces the config's base, `stretched=False` its scaling. `divisors` are a GGUF file's `rope_freqs`:
    frequencies are divided by them (what else the checkpoint's authors did is in them). Su et al. 2021 (RoFormer).
    """

    def __init__(
        self,
        c: ModelConfig,
        *,
        interleaved: bool = False,
        divisors: Array | None = None,
        theta: float | None = None,
        stretched: bool = True,
    ) -> None:
        self.interleaved = interleaved
        turning = Turning(c, inverse_frequencies(c.rotary_dim, theta or c.rope_theta))
        if divisors is not None:
            turning.frequencies /= plain(divisors, np.float32)
        if stretched and c.rope_scaling is not None:
            stretch(turning, c.rope_scaling)
        angles = np.arange(c.longest, dtype=np.float32)[:, None] * turning.frequencies[None, :]
        wide = angles.astype(np.float64)  # products as published, in float32; their functions to the last bit
        self.cos, self.sin = ((f(wide) * turning.factor).astype(np.float32) for f in (np.cos, np.sin))


@dataclass
class Turning:
    """How fast each pair turns, radians per token [rotary_dim / 2], and what its cos and sin are multiplied with."""

    c: ModelConfig
    frequencies: Floats
    factor: float = 1.0


def inverse_frequencies(rotary_dim: int, theta: float) -> Floats:
    """theta^(-2i/d) for every pair i: [rotary_dim / 2], radians per token."""
    exponents = np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)
    frequencies: Floats = np.float32(1) / np.power(np.float32(theta), exponents)
    return frequencies


def stretch(turning: Turning, scaling: dict[str, object]) -> None:
    """Applies a checkpoint's `rope_scaling`; a kind we do not know is an error, never ignored."""
    kind = "longrope" if "long_factor" in scaling else str(scaling.get("rope_type"))  # once called "su", or "yarn"
    if kind not in STRETCHES:
        known = ", ".join(sorted(STRETCHES))
        raise ModelError(f"rope_scaling of type {kind!r} is not supported yet (supported: {known})")
    STRETCHES[kind](turning, scaling)


def linear(turning: Turning, scaling: dict[str, object]) -> None:
    """Positions are divided by `factor`. Chen et al. 2023."""
    turning.frequencies /= np.float32(number(scaling, "factor"))


def dynamic(turning: Turning, scaling: dict[str, object]) -> None:
    """Nothing up to the trained length; a server of longer sequences raises the base for all of them.

    Published for one sequence, whose base grows with it; here the base is that of the longest sequence served, so that
    a position's angle never changes (what is cached stays right).
    """
    c, factor = turning.c, number(scaling, "factor")
    if c.longest > c.max_position_embeddings:
        growth = factor * c.longest / c.max_position_embeddings - (factor - 1)
        theta = c.rope_theta * growth ** (c.rotary_dim / (c.rotary_dim - 2))
        turning.frequencies = inverse_frequencies(c.rotary_dim, theta)


def llama3(turning: Turning, scaling: dict[str, object]) -> None:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high, original = (
        number(scaling, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    frequencies = turning.frequencies
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = np.where(wavelengths > original / low, frequencies / factor, between)
    turning.frequencies = np.where(wavelengths < original / high, frequencies, stretched).astype(np.float32)


def yarn(turning: Turning, scaling: dict[str, object]) -> None:
    """Slow pairs are stretched by `factor`, fast ones kept, with a linear ramp between. Peng et al. 2023."""
    c = turning.c
    original = number(scaling, "original_max_position_embeddings", c.max_position_embeddings)
    factor = number(scaling, "factor", c.max_position_embeddings / original)
    ends = [
        c.rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))
        for turns in (number(scaling, "beta_fast", 32), number(scaling, "beta_slow", 1))
    ]
    if scaling.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], c.rotary_dim - 1)
    pairs = np.arange(c.rotary_dim // 2, dtype=np.float32)
    slow = np.clip((pairs - low) / (max(high - low, 0.001)), 0, 1).astype(np.float32)
    turning.frequencies = turning.frequencies / np.float32(factor) * slow + turning.frequencies * (1 - slow)
    turning.factor = number(scaling, "attention_factor", yarn_attention(factor, scaling))


def yarn_attention(factor: float, scaling: dict[str, object]) -> float:
    """What yarn multiplies cos and sin with where the config does not say it outright."""
    scales = [number(scaling, name, 0) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        scales = [1, 0]
    return (0.1 * scales[0] * grown(factor) + 1) / (0.1 * scales[1] * grown(factor) + 1)


def longrope(turning: Turning, scaling: dict[str, object]) -> None:
    """Every pair has a divisor of its own: one list for servers up to the trained length, one for longer ones.

    Published for one sequence, which is computed anew when it outgrows the trained length; here the longest sequence
    served decides, so that a position's angle never changes. Ding et al. 2024.
    """
    c = turning.c
    original = number(scaling, "original_max_position_embeddings", c.max_position_embeddings)
    factor = number(scaling, "factor", c.max_position_embeddings / original)
    name = "long_factor" if c.longest > original else "short_factor"
    turning.frequencies = turning.frequencies / divisors(scaling, name, len(turning.frequencies))
    attention = math.sqrt(1 + grown(factor) / math.log(original))
    turning.factor = number(scaling, "attention_factor", attention)


STRETCHES: dict[str, Callable[[Turning, dict[str, object]], None]] = {
    "default": lambda turning, scaling: None,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def grown(factor: float) -> float:
    """log(factor), 0 where nothing is stretched."""
    return math.log(max(factor, 1.0))


def number(scaling: dict[str, object], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"rope_scaling.{name} must be a number, got {value!r}")
    return float(value)


def divisors(scaling: dict[str, object], name: str, count: int) -> Floats:
    """One positive number for each of `count` pairs."""
    values = scaling.get(name)
    right = isinstance(values, list) and len(values) == count and all(isinstance(v, int | float) for v in values)
    if not isinstance(values, list) or not right or not all(0 < v < 1e30 for v in values):
        raise ModelError(f"rope_scaling.{name} must be a list of {count} positive numbers")
    return np.array(values, np.float32)
