"""Baichuan 1 and 2: Llama with one fused projection; ALiBi in the 13B models, a normed head in 2. Yang et al. 2023."""

from __future__ import annotations

from textmill.layers.attention import Attention, fused_qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import row
from textmill.layers.mlp import GatedMLP
from textmill.layers.norm import RMSNorm
from textmill.layers.positions import alibi_slopes
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope | None) -> None:
        attn = w / "self_attn"
        qkv, slopes = fused_qkv(c, attn, "W_pack"), None if rope else alibi_slopes(c.heads)
        self.norm = RMSNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(c, qkv, row(attn, "o_proj"), layer, rope=rope, alibi=slopes)
        self.mlp_norm = RMSNorm(w / "post_attention_layernorm", c.norm_eps)
        self.mlp = GatedMLP(w / "mlp", "gate_proj", "up_proj", "down_proj", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model"
        embed, rope = Embedding(body / "embed_tokens"), None if c.switch("alibi", False) else Rope(c)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "layers" / str(i), i, rope) for i in range(c.num_layers)],
            norm=RMSNorm(body / "norm", c.norm_eps),
            head=head(w / "lm_head", embed, normed=c.switch("norm_head", False)),
        )
