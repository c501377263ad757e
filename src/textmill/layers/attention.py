"""Multi-head attention with grouped keys: projections here, cache and arithmetic behind `ctx.attend`."""

from __future__ import annotations

from textmill.kernels.spec import AttentionSpec
from textmill.layers.linear import Linear, column
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


def qkv(c: ModelConfig, w: View, query: str, key: str, value: str) -> Linear:
    """One projection to queries, keys and values: outputs [q (heads x d) | k (kv_heads x d) | v (kv_heads x d)]."""
    return column(w, query, key, value)


class Attention:
    """Attends over the sequence's own past; `layer` numbers its share of the key/value cache."""

    def __init__(self, c: ModelConfig, qkv: Linear, out: Linear, layer: int, *, rope: Rope | None = None) -> None:
        self.qkv = qkv
        self.out = out
        self.layer = layer
        self.spec = AttentionSpec(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5,
            window=c.sliding_window or 0,
            rope_cos=rope.cos if rope else None,
            rope_sin=rope.sin if rope else None,
            rope_interleaved=rope.interleaved if rope else False,
        )

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        return self.out(ctx.attend(self.qkv(x), self.layer, self.spec))
