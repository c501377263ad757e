"""Falcon: attention and MLP side by side behind one norm or two, or (RW) in sequence. Almazrouei et al. 2023."""

from __future__ import annotations

from textmill.kernels.spec import Array
from textmill.layers.attention import Attention, fused_qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import row
from textmill.layers.mlp import MLP
from textmill.layers.norm import LayerNorm
from textmill.layers.positions import alibi_key_bias
from textmill.layers.rotary import Rope
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    """One norm before both (7B, 11B), one before each (40B, 180B), or one after the other (RW)."""

    def __init__(self, c: ModelConfig, w: View, layer: int, rope: Rope | None, key_bias: Array | None) -> None:
        attn, two = w / "self_attention", w.has("ln_attn.weight")
        qkv = fused_qkv(c, attn, "query_key_value", by_group=True)
        self.parallel = c.switch("parallel_attn", True)
        self.norm = LayerNorm(w / ("ln_attn" if two else "input_layernorm"), c.norm_eps)
        self.attn = Attention(c, qkv, row(attn, "dense"), layer, rope=rope, key_bias=key_bias)
        own = w / ("ln_mlp" if two else "post_attention_layernorm")
        self.mlp_norm = LayerNorm(own, c.norm_eps) if two or not self.parallel else None
        self.mlp = MLP(w / "mlp", "dense_h_to_4h", "dense_4h_to_h", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        normed = self.norm(x)
        after = x + self.attn(normed, ctx)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(x if self.parallel else after)
        return after + self.mlp(normed)


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body, alibi = w / "transformer", c.switch("alibi", False)
        embed, rope = Embedding(body / "word_embeddings"), None if alibi else Rope(c)
        key_bias = alibi_key_bias(c.heads, c.max_position_embeddings, c.head_dim) if alibi else None
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "h" / str(i), i, rope, key_bias) for i in range(c.num_layers)],
            norm=LayerNorm(body / "ln_f", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
