"""MPT: ALiBi or learned positions, no biases, queries and keys clipped or normed where asked. MosaicML 2023."""

from __future__ import annotations

from textmill.kernels.spec import Array
from textmill.layers.attention import Attention, fused_qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, Logits, head
from textmill.layers.linear import Clipped, row
from textmill.layers.mlp import MLP
from textmill.layers.norm import LayerNorm
from textmill.layers.positions import Positions, alibi_slopes_of_next_power
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, slopes: Array | None) -> None:
        attn, normed = w / "attn", c.switch("qk_ln", False)
        clip = c.real("clip_qkv")
        self.norm = LayerNorm(w / "norm_1", c.norm_eps)
        self.attn = Attention(
            c,
            fused_qkv(c, attn, "Wqkv") if clip is None else Clipped(fused_qkv(c, attn, "Wqkv"), clip),
            row(attn, "out_proj"),
            layer,
            scale=c.real("softmax_scale"),
            q_norm=LayerNorm(attn / "q_ln", c.norm_eps) if normed else None,
            k_norm=LayerNorm(attn / "k_ln", c.norm_eps) if normed else None,
            alibi=slopes,
        )
        self.mlp_norm = LayerNorm(w / "norm_2", c.norm_eps)
        self.mlp = MLP(w / "ffn", "up_proj", "down_proj", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "transformer"
        embed = Embedding(body / "wte")
        positions = Positions(body / "wpe") if body.has("wpe.weight") else None
        alibi = c.switch("alibi", positions is None)
        slopes = alibi_slopes_of_next_power(c.heads, c.real("alibi_bias_max") or 8.0) if alibi else None
        super().__init__(
            embed=(lambda ctx: embed(ctx) + positions(ctx)) if positions else embed,
            blocks=[Block(c, body / "blocks" / str(i), i, slopes) for i in range(c.num_layers)],
            norm=LayerNorm(body / "norm_f", c.norm_eps),
            head=Logits(head(w / "lm_head", embed), scale=c.real("logit_scale") or 1.0),
        )
