"""Normalisation over the last dimension, computed in float32."""

from __future__ import annotations

from textmill.kernels import dispatch
from textmill.layers.types import Hidden, hidden
from textmill.weights.view import View


class RMSNorm:
    """x / rms(x) x weight; `plus_one` for checkpoints that store the weight minus one (Gemma). Zhang 2019."""

    def __init__(self, w: View, eps: float, *, plus_one: bool = False) -> None:
        self.weight = w.tensor("weight")
        self.eps = eps
        self.plus_one = plus_one

    def __call__(self, x: Hidden) -> Hidden:
        return hidden(dispatch.rms_norm(x, self.weight, self.eps, plus_one=self.plus_one))
