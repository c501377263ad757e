"""Rotary position tables: cos and sin of every position, with the published ways to stretch them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.kernels.native import plain
from textmill.kernels.spec import Array
from textmill.weights.config import ModelConfig

Floats = NDArray[np.float32]


class Rope:
    """Tables `cos`, `sin`: float32 [positions, rotary_dim / 2]; pairs are (x[i], x[i + d/2]) unless `interleaved`.

    `divisors` are a GGUF file's `rope_freqs` (frequencies are divided by them). Su et al. 2021 (RoFormer).
    """

    def __init__(self, c: ModelConfig, *, interleaved: bool = False, divisors: Array | None = None) -> None:
        self.interleaved = interleaved
        frequencies = inverse_frequencies(c.rotary_dim, c.rope_theta)
        if divisors is None:
            frequencies = scaled(frequencies, c.rope_scaling)
        else:
            frequencies = frequencies / plain(divisors, np.float32)
        angles = np.arange(c.max_position_embeddings, dtype=np.float32)[:, None] * frequencies[None, :]
        wide = angles.astype(np.float64)  # products as published, in float32; their functions to the last bit
        self.cos, self.sin = np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def inverse_frequencies(rotary_dim: int, theta: float) -> Floats:
    """theta^(-2i/d) for every pair i: [rotary_dim / 2], radians per token."""
    exponents = np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)
    frequencies: Floats = np.float32(1) / np.power(np.float32(theta), exponents)
    return frequencies


def scaled(frequencies: Floats, scaling: dict[str, object] | None) -> Floats:
    """Frequencies under a checkpoint's `rope_scaling`; a kind we do not know is an error, never ignored."""
    kind = str((scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default")
    if scaling is None or kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / np.float32(number(scaling, "factor"))
    if kind == "llama3":
        return llama3(frequencies, scaling)
    raise ModelError(f"rope_scaling of type {kind!r} is not supported yet (supported: default, linear, llama3)")


def llama3(frequencies: Floats, scaling: dict[str, object]) -> Floats:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high, original = (
        number(scaling, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = np.where(wavelengths > original / low, frequencies / factor, between)
    return np.where(wavelengths < original / high, frequencies, stretched)


def number(scaling: dict[str, object], name: str) -> float:
    value = scaling.get(name)
    if not isinstance(value, int | float):
        raise ModelError(f"rope_scaling.{name} must be a number, got {value!r}")
    return float(value)
