"""Feed-forward layers."""

from __future__ import annotations

from textmill.kernels import dispatch
from textmill.layers.linear import column, row
from textmill.layers.types import Hidden, hidden
from textmill.weights.view import View


class GatedMLP:
    """down(act(gate(x)) * up(x)); gate and up are one product over one input. Shazeer 2020.

    `up` None: the matrix `gate` holds both, one after the other.
    """

    def __init__(self, w: View, gate: str, up: str | None, down: str, activation: str) -> None:
        self.gate_up = column(w, gate, up) if up else column(w, gate, halves=True)
        self.down = row(w, down)
        self.activation = activation

    def __call__(self, x: Hidden) -> Hidden:
        gate_up = self.gate_up
        matrix = gate_up.matrix.form_for(x)
        return self.down(hidden(dispatch.matmul(x, matrix, bias=gate_up.bias, activation=self.activation, gated=True)))


class MLP:
    """down(act(up(x))), with the biases that the checkpoint has."""

    def __init__(self, w: View, up: str, down: str, activation: str) -> None:
        self.up = column(w, up)
        self.down = row(w, down)
        self.activation = activation

    def __call__(self, x: Hidden) -> Hidden:
        up = self.up
        return self.down(hidden(dispatch.matmul(x, up.matrix.form_for(x), bias=up.bias, activation=self.activation)))
