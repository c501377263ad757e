"""Rotary position tables: cos and sin of every position, with the published ways to stretch them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from textmill.errors import ModelError
from textmill.weights.config import ModelConfig


class Rope:
    """Tables `cos`, `sin`: float32 [positions, rotary_dim / 2]; pairs are (x[i], x[i + d/2]) unless `interleaved`.

    `divisors` are a GGUF file's `rope_freqs` (frequencies are divided by them). Su et al. 2021 (RoFormer).
    """

    def __init__(self, c: ModelConfig, *, interleaved: bool = False, divisors: Tensor | None = None) -> None:
        self.interleaved = interleaved
        frequencies = inverse_frequencies(c.rotary_dim, c.rope_theta)
        frequencies = frequencies / divisors if divisors is not None else scaled(frequencies, c.rope_scaling)
        angles = torch.arange(c.max_position_embeddings, dtype=torch.float32)[:, None] * frequencies[None, :]
        self.cos, self.sin = angles.cos().contiguous(), angles.sin().contiguous()


def inverse_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """theta^(-2i/d) for every pair i: [rotary_dim / 2], radians per token."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    return 1.0 / (theta**exponents)


def scaled(frequencies: Tensor, scaling: dict[str, object] | None) -> Tensor:
    """Frequencies under a checkpoint's `rope_scaling`; a kind we do not know is an error, never ignored."""
    kind = str((scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default")
    if scaling is None or kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / number(scaling, "factor")
    if kind == "llama3":
        return llama3(frequencies, scaling)
    raise ModelError(f"rope_scaling of type {kind!r} is not supported yet (supported: default, linear, llama3)")


def llama3(frequencies: Tensor, scaling: dict[str, object]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high, original = (
        number(scaling, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, stretched)


def number(scaling: dict[str, object], name: str) -> float:
    value = scaling.get(name)
    if not isinstance(value, int | float):
        raise ModelError(f"rope_scaling.{name} must be a number, got {value!r}")
    return float(value)
