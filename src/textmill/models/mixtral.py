"""Mixtral: Llama's block with a mixture of gated experts for its MLP. Jiang et al. 2024."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import replicated, row
from textmill.layers.moe import MoE, experts, fused_experts
from textmill.layers.norm import RMSNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


def mixture(c: ModelConfig, w: View) -> MoE:
    """The experts under the hub's names, or under those that transformers has for them in memory."""
    if w.has("mlp.experts.gate_up_proj"):
        w = w / "mlp"
        found = fused_experts(w / "experts", c.experts, "gate_up_proj", "down_proj")
    else:
        w = w / "block_sparse_moe"
        found = experts(w / "experts", c.experts, "w1", "w3", "w2")
    return MoE(replicated(w, "gate"), found, top_k=c.experts_per_token, activation=c.hidden_act)


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope) -> None:
        attn = w / "self_attn"
        self.norm = RMSNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(c, qkv(c, attn, "q_proj", "k_proj", "v_proj"), row(attn, "o_proj"), layer, rope=rope)
        self.moe_norm = RMSNorm(w / "post_attention_layernorm", c.norm_eps)
        self.moe = mixture(c, w)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.moe(self.moe_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model"
        embed, rope = Embedding(body / "embed_tokens"), Rope(c)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "layers" / str(i), i, rope) for i in range(c.num_layers)],
            norm=RMSNorm(body / "norm", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
