"""Gemma 2: norms before and after attention and MLP, capped scores and logits, windows on every other layer."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv, window_of
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, Logits, head
from textmill.layers.linear import row
from textmill.layers.mlp import GatedMLP
from textmill.layers.norm import RMSNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope) -> None:
        attn = w / "self_attn"
        self.norm, self.attn_norm, self.mlp_norm, self.out_norm = (
            RMSNorm(w / f"{name}_layernorm", c.norm_eps, plus_one=True)
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        )
        self.attn = Attention(
            c,
            qkv(c, attn, "q_proj", "k_proj", "v_proj"),
            row(attn, "o_proj"),
            layer,
            rope=rope,
            scale=(c.real("query_pre_attn_scalar") or c.head_dim) ** -0.5,
            window=window_of(c, layer, slides=layer % 2 == 0),
            softcap=c.real("attn_logit_softcapping") or 0.0,
        )
        self.mlp = GatedMLP(w / "mlp", "gate_proj", "up_proj", "down_proj", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn_norm(self.attn(self.norm(x), ctx))
        return x + self.out_norm(self.mlp(self.mlp_norm(x)))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model"
        embed, rope = Embedding(body / "embed_tokens", scale=c.hidden_size**0.5), Rope(c)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "layers" / str(i), i, rope) for i in range(c.num_layers)],
            norm=RMSNorm(body / "norm", c.norm_eps, plus_one=True),
            head=Logits(head(w / "lm_head", embed), cap=c.real("final_logit_softcapping") or 0.0),
        )
