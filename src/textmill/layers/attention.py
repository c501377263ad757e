"""Multi-head attention with grouped keys: projections here, cache and arithmetic behind `ctx.attend`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from textmill.kernels.spec import Array, AttentionSpec
from textmill.layers.linear import Linear, bias, column, joined
from textmill.layers.norm import LayerNorm, RMSNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


def qkv(c: ModelConfig, w: View, query: str, key: str, value: str) -> Linear:
    """One projection to queries, keys and values: outputs [q (heads x d) | k (kv_heads x d) | v (kv_heads x d)]."""
    return column(w, query, key, value)


def fused_qkv(c: ModelConfig, w: View, *names: str, by_group: bool = False) -> Linear:
    """The same from matrices that hold it already, stored as [q; k; v] one after the other.

    `by_group`: stored as one piece per key head, [its queries; key; value] (with as many key heads as heads: by head).
    """
    views = [w / name for name in names]
    if not by_group:
        return column(w, *names)
    rows = grouped_rows(c.heads, c.kv_heads, c.head_dim)
    biases = bias(views)
    return Linear(joined(views).rows(rows), None if biases is None else biases[rows])


def grouped_rows(heads: int, kv_heads: int, head_dim: int) -> NDArray[np.int64]:
    """Where a matrix in pieces [queries of a key head; key; value] holds the rows of [q; k; v]."""
    queries = heads // kv_heads
    stored = np.arange((heads + 2 * kv_heads) * head_dim).reshape(kv_heads, queries + 2, head_dim)
    return np.concatenate([stored[:, :queries].ravel(), stored[:, queries].ravel(), stored[:, queries + 1].ravel()])


def window_of(c: ModelConfig, layer: int, *, slides: bool) -> int:
    """How far a layer looks back, 0 for all the way; `slides` decides where the config has no list of layer types."""
    if c.layer_types:
        slides = c.layer_types[layer] == "sliding_attention"
    return (c.sliding_window or 0) if slides else 0


class Attention:
    """Attends over the sequence's own past; `layer` numbers its share of the key/value cache.

    `window` None: the config's, on every layer. `q_norm`, `k_norm`: applied to each head before it is rotated.
    """

    def __init__(
        self,
        c: ModelConfig,
        qkv: Linear,
        out: Linear,
        layer: int,
        *,
        rope: Rope | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        q_norm: RMSNorm | LayerNorm | None = None,
        k_norm: RMSNorm | LayerNorm | None = None,
        alibi: Array | None = None,
        key_bias: Array | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.layer = layer
        self.spec = AttentionSpec(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5 if scale is None else scale,
            window=(c.sliding_window or 0) if window is None else window,
            softcap=softcap,
            alibi=alibi,
            key_bias=key_bias,
            rope_cos=rope.cos if rope else None,
            rope_sin=rope.sin if rope else None,
            rope_interleaved=rope.interleaved if rope else False,
            q_norm=q_norm.factors if q_norm else None,
            k_norm=k_norm.factors if k_norm else None,
            q_norm_bias=q_norm.bias if q_norm else None,
            k_norm_bias=k_norm.bias if k_norm else None,
            head_norm="layer" if isinstance(q_norm, LayerNorm) else "rms",
            norm_eps=q_norm.eps if q_norm else c.norm_eps,
        )

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        return self.out(ctx.attend(self.qkv(x), self.layer, self.spec))
