"""A state-space mixer in place of attention: a short convolution, then a scan whose steps depend on the input."""

from __future__ import annotations

import numpy as np

from textmill.kernels.native import plain
from textmill.kernels.spec import ConvolutionSpec, ScanSpec
from textmill.layers.linear import Summed, bias, column, matrix, row, share
from textmill.layers.types import Context, Hidden
from textmill.weights.view import View


class StateSpaceMixer:
    """Gu and Dao 2023. `layer` numbers its two states: the last inputs of the convolution, then the scan's."""

    def __init__(self, w: View, layer: int) -> None:
        channels, columns = w.shape("A_log")
        rank = w.shape("x_proj.weight")[0] - 2 * columns
        own = share(w, channels)  # of all that is per channel
        taps = w / "conv1d"
        self.into = column(w, "in_proj", halves=True)  # [x | gate]
        weight = plain(taps.tensor("weight", own), np.float32)
        self.convolution = ConvolutionSpec(weight[:, 0], bias([taps], [own]))
        self.scanning = ScanSpec(-np.exp(plain(w.tensor("A_log", own), np.float32)), w.tensor("D", own))
        self.to_step = Summed(matrix(w / "x_proj", range(rank), own), None, w.group)
        self.to_state = Summed(matrix(w / "x_proj", range(rank, rank + 2 * columns), own), None, w.group)  # [b | c]
        self.step = column(w, "dt_proj")
        self.out = row(w, "out_proj")
        self.first = 2 * layer

    @property
    def states(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what a sequence keeps of this layer."""
        channels, taps = self.convolution.weight.shape
        return (channels, taps - 1), tuple(self.scanning.a.shape)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        both = self.into(x)
        x = ctx.convolve(both, self.first, self.convolution)
        step = self.step(self.to_step(x))
        return self.out(ctx.scan(x, step, self.to_state(x), both, self.first + 1, self.scanning))
