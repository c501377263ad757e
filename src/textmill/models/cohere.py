"""Command R: one layer norm for attention and MLP side by side, interleaved rope, scaled logits. Cohere 2024."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, Logits, head
from textmill.layers.linear import row
from textmill.layers.mlp import GatedMLP
from textmill.layers.norm import LayerNorm
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope) -> None:
        attn = w / "self_attn"
        normed = c.switch("use_qk_norm", False)
        self.norm = LayerNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(
            c,
            qkv(c, attn, "q_proj", "k_proj", "v_proj"),
            row(attn, "o_proj"),
            layer,
            rope=rope,
            q_norm=LayerNorm(attn / "q_norm", c.norm_eps) if normed else None,
            k_norm=LayerNorm(attn / "k_norm", c.norm_eps) if normed else None,
        )
        self.mlp = GatedMLP(w / "mlp", "gate_proj", "up_proj", "down_proj", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        normed = self.norm(x)
        return x + self.attn(normed, ctx) + self.mlp(normed)


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model"
        embed, rope = Embedding(body / "embed_tokens"), Rope(c, interleaved=True)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "layers" / str(i), i, rope) for i in range(c.num_layers)],
            norm=LayerNorm(body / "norm", c.norm_eps),
            head=Logits(head(w / "lm_head", embed), scale=c.real("logit_scale") or 1.0),
        )
