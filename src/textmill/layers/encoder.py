"""Attention that is not over a sequence's own past: an encoder's, both ways, and a decoder's over what it made."""

from __future__ import annotations

from textmill.kernels.spec import Array, AttentionSpec
from textmill.layers.attention import part_of, qkv
from textmill.layers.linear import column, row
from textmill.layers.types import Context, EncoderContext, Hidden
from textmill.parallel.group import ALONE
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


def spec_of(c: ModelConfig, w: View, scale: float, relative: Array | None = None) -> AttentionSpec:
    """This rank's heads, as many for keys as for queries."""
    whole = AttentionSpec(c.heads, c.heads, c.head_dim, scale, relative=relative)
    return whole if w.group is ALONE else part_of(whole, w.group)


class TwoWayAttention:
    """Every token attends over the whole text. `relative`: see `EncoderContext.attend_both`."""

    def __init__(self, c: ModelConfig, w: View, *names: str, scale: float, relative: Array | None = None) -> None:
        query, key, value, out = names
        self.qkv = qkv(c, w, query, key, value)
        self.out = row(w, out)
        self.spec = spec_of(c, w, scale, relative)

    def __call__(self, x: Hidden, ctx: EncoderContext) -> Hidden:
        return self.out(ctx.attend_both(self.qkv(x), self.spec))


class CrossAttention:
    """Attends over the encoder's output, whose keys and values (`remember`) are made once for a sequence."""

    def __init__(self, c: ModelConfig, w: View, layer: int, *names: str, scale: float) -> None:
        query, key, value, out = names
        self.query = column(w, query)
        self.remember = column(w, key, value)
        self.out = row(w, out)
        self.layer = layer
        self.spec = spec_of(c, w, scale)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        return self.out(ctx.attend_encoded(self.query(x), self.layer, self.spec))
