"""Qwen 3 with experts: Qwen 3's block, most layers with a mixture of experts for their MLP. Yang et al. 2025."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import replicated, row
from textmill.layers.mlp import GatedMLP
from textmill.layers.moe import MoE, experts
from textmill.layers.norm import RMSNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View

NAMES = ("gate_proj", "up_proj", "down_proj")


def mixture(c: ModelConfig, w: View) -> MoE:
    norm = 1.0 if c.switch("norm_topk_prob", False) else None
    own = experts(w / "experts", c.experts, *NAMES)
    return MoE(replicated(w, "gate"), own, top_k=c.experts_per_token, activation=c.hidden_act, norm=norm)


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope) -> None:
        attn, mlp = w / "self_attn", w / "mlp"
        self.norm = RMSNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(
            c,
            qkv(c, attn, "q_proj", "k_proj", "v_proj"),
            row(attn, "o_proj"),
            layer,
            rope=rope,
            q_norm=RMSNorm(attn / "q_norm", c.norm_eps),
            k_norm=RMSNorm(attn / "k_norm", c.norm_eps),
        )
        self.mlp_norm = RMSNorm(w / "post_attention_layernorm", c.norm_eps)
        self.mlp = mixture(c, mlp) if mlp.has("gate.weight") else GatedMLP(mlp, *NAMES, c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


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
