"""Phi 1 to 2: one layer norm for attention and MLP side by side, partly rotated heads. Gunasekar et al. 2023."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import row
from textmill.layers.mlp import MLP
from textmill.layers.norm import LayerNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope) -> None:
        attn = w / "self_attn"
        normed = c.switch("qk_layernorm", False)
        self.norm = LayerNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(
            c,
            qkv(c, attn, "q_proj", "k_proj", "v_proj"),
            row(attn, "dense"),
            layer,
            rope=rope,
            q_norm=LayerNorm(attn / "q_layernorm", c.norm_eps) if normed else None,
            k_norm=LayerNorm(attn / "k_layernorm", c.norm_eps) if normed else None,
        )
        self.mlp = MLP(w / "mlp", "fc1", "fc2", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        normed = self.norm(x)
        return x + self.attn(normed, ctx) + self.mlp(normed)


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model"
        embed, rope = Embedding(body / "embed_tokens"), Rope(c)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "layers" / str(i), i, rope) for i in range(c.num_layers)],
            norm=LayerNorm(body / "final_layernorm", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
