"""Normalisation over the last dimension, computed in float32."""

from __future__ import annotations

import numpy as np

from textmill.kernels import dispatch
from textmill.kernels.native import plain
from textmill.kernels.spec import Array
from textmill.layers.types import Hidden, hidden
from textmill.weights.view import View


class RMSNorm:
    """x / rms(x) x weight; `plus_one` for checkpoints that store the weight minus one (Gemma). Zhang 2019."""

    def __init__(self, w: View, eps: float, *, plus_one: bool = False) -> None:
        self.weight = w.tensor("weight")
        self.bias: Array | None = None
        self.eps = eps
        self.plus_one = plus_one

    @property
    def factors(self) -> Array:
        """What the normed values are multiplied with."""
        return plain(self.weight, np.float32) + 1 if self.plus_one else self.weight

    def __call__(self, x: Hidden) -> Hidden:
        return hidden(dispatch.rms_norm(x, self.weight, self.eps, plus_one=self.plus_one))


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) x weight + bias; a bias only where the checkpoint has one. Ba et al. 2016.

    `affine=False` is for models whose norms have neither weight nor bias.
    """

    def __init__(self, w: View, eps: float, *, affine: bool = True) -> None:
        self.weight: Array = w.tensor("weight") if affine else np.ones(w.config.hidden_size, np.float32)
        self.bias = w.tensor("bias") if affine and w.has("bias") else None
        self.eps = eps

    @property
    def factors(self) -> Array:
        """What the normed values are multiplied with."""
        return self.weight

    def __call__(self, x: Hidden) -> Hidden:
        return hidden(dispatch.layer_norm(x, self.weight, self.bias, self.eps))
