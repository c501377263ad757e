"""Multi-head attention with grouped keys: projections here, cache and arithmetic behind `ctx.attend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ConfigError
from textmill.kernels.spec import CHUNK, Array, AttentionSpec
from textmill.layers.linear import Linear, bias, joined
from textmill.layers.norm import LayerNorm, RMSNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.parallel.group import ALONE, Group
from textmill.weights.config import ModelConfig
from textmill.weights.stretches import Indices
from textmill.weights.view import View


def qkv(c: ModelConfig, w: View, query: str, key: str, value: str) -> Linear:
    """One projection to queries, keys and values: outputs [q (heads x d) | k (kv_heads x d) | v (kv_heads x d)]."""
    return fused_qkv(c, w, query, key, value)


def fused_qkv(c: ModelConfig, w: View, *names: str, by_group: bool = False) -> Linear:
    """The same from matrices that hold it already, stored as [q; k; v] one after the other.

    `by_group`: stored as one piece per key head, [its queries; key; value] (with as many key heads as heads: by head).
    """
    views = [w / name for name in names]
    if by_group:
        rows = grouped_rows(c.heads, c.kv_heads, c.head_dim)
    elif w.group is ALONE:
        return Linear(joined(views), bias(views))
    else:
        rows = np.arange((c.heads + 2 * c.kv_heads) * c.head_dim)
    parts = pieces(views, rows[rank_rows(c, w)])
    return Linear(joined(views, parts), bias(views, parts), w.group)


def rank_rows(c: ModelConfig, w: View) -> NDArray[np.int64]:
    """Which rows of [q; k; v] are this rank's heads."""
    queries, keys = w.group.heads(c.heads, c.kv_heads)
    if w.group is not ALONE and w.checkpoint.packed and len(queries) * c.head_dim % CHUNK:
        raise ConfigError(f"{len(queries)} heads of {c.head_dim} a rank do not fill whole groups of packed weights")
    heads = [*queries, *(c.heads + k for k in keys), *(c.heads + c.kv_heads + k for k in keys)]
    return (np.array(heads)[:, None] * c.head_dim + np.arange(c.head_dim)).ravel()


def pieces(views: Sequence[View], rows: NDArray[np.int64]) -> list[Indices | None]:
    """Rows of a stack of matrices as rows of each of them; they come in the order of the stack."""
    ends = np.cumsum([view.shape("weight")[0] for view in views])
    starts = [0, *ends[:-1]]
    return [rows[(rows >= a) & (rows < b)] - a for a, b in zip(starts, ends, strict=True)]


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
        relative: Array | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.layer = layer
        whole = AttentionSpec(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5 if scale is None else scale,
            window=(c.sliding_window or 0) if window is None else window,
            softcap=softcap,
            alibi=alibi,
            key_bias=key_bias,
            relative=relative,
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
        self.spec = whole if qkv.group is ALONE else part_of(whole, qkv.group)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        return self.out(ctx.attend(self.qkv(x), self.layer, self.spec))


def part_of(whole: AttentionSpec, group: Group) -> AttentionSpec:
    """The attention of this rank's heads."""
    queries, keys = group.heads(whole.heads, whole.kv_heads)
    return replace(
        whole,
        heads=len(queries),
        kv_heads=len(keys),
        alibi=None if whole.alibi is None else whole.alibi[queries.start : queries.stop],
        key_bias=None if whole.key_bias is None else whole.key_bias[queries.start : queries.stop],
        relative=None if whole.relative is None else whole.relative[queries.start : queries.stop],
        q_norm=heads_of(whole.q_norm, queries, whole),
        k_norm=heads_of(whole.k_norm, keys, whole),
        q_norm_bias=heads_of(whole.q_norm_bias, queries, whole),
        k_norm_bias=heads_of(whole.k_norm_bias, keys, whole),
    )


def heads_of(values: Array | None, heads: range, whole: AttentionSpec) -> Array | None:
    """Some heads' part of a norm's numbers, where these are each head's own."""
    if values is None or values.shape == (whole.head_dim,):
        return values
    if values.ndim == 1:
        raise ConfigError("a norm over all heads together cannot be split between ranks; use --num-shard 1")
    return values.reshape(-1, whole.head_dim)[heads.start : heads.stop]
