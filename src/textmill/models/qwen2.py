"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows from some layer on. Yang et al. 2024."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv, window_of
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
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
        slides = c.switch("use_sliding_window", False) and layer >= c.number("max_window_layers", 28)
        window = window_of(c, layer, slides=slides)
        made = qkv(c, attn, "q_proj", "k_proj", "v_proj")
        self.norm = RMSNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(c, made, row(attn, "o_proj"), layer, rope=rope, window=window)
        self.mlp_norm = RMSNorm(w / "post_attention_layernorm", c.norm_eps)
        self.mlp = GatedMLP(w / "mlp", "gate_proj", "up_proj", "down_proj", c.hidden_act)

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
