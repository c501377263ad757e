"""DBRX: layer norms without bias, clipped queries, keys and values, many small experts. Databricks 2024."""

from __future__ import annotations

from textmill.layers.attention import Attention, fused_qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import Clipped, replicated, row
from textmill.layers.moe import MoE, experts, rowwise_experts
from textmill.layers.norm import LayerNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


def mixture(c: ModelConfig, w: View) -> MoE:
    """The experts as the hub stores them, or (GGUF) each on its own."""
    mlp = w / "experts" / "mlp"
    layout = rowwise_experts if mlp.has("w1") else experts
    norm = None if c.switch("plain_expert_weights", False) else c.real("moe_normalize_expert_weights") or 1.0
    found = layout(mlp, c.experts, "w1", "v1", "w2")
    return MoE(replicated(w / "router", "layer"), found, top_k=c.experts_per_token, activation=c.hidden_act, norm=norm)


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope) -> None:
        outer, clip = w / "norm_attn_norm", c.real("clip_qkv")
        projection = fused_qkv(c, outer / "attn", "Wqkv")
        self.norm = LayerNorm(outer / "norm_1", c.norm_eps)
        self.attn = Attention(
            c, Clipped(projection, clip) if clip else projection, row(outer / "attn", "out_proj"), layer, rope=rope
        )
        self.moe_norm = LayerNorm(outer / "norm_2", c.norm_eps)
        self.moe = mixture(c, w / "ffn")

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.moe(self.moe_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "transformer"
        embed, rope = Embedding(body / "wte"), Rope(c)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "blocks" / str(i), i, rope) for i in range(c.num_layers)],
            norm=LayerNorm(body / "norm_f", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
