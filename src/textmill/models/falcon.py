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


def attention(c: ModelConfig, w: View, layer: int, positions: Rope | Array) -> Attention:
    return Attention(
        c,
        fused_qkv(c, w, "query_key_value", by_group=True),
        row(w, "dense"),
        layer,
        rope=positions if isinstance(positions, Rope) else None,
        key_bias=None if isinstance(positions, Rope) else positions,
    )


class Parallel:
    """The 7B model has one norm for both, the 40B and 180B ones one each, the 11B one again."""

    def __init__(self, c: ModelConfig, w: View, layer: int, positions: Rope | Array) -> None:
        two = w.has("ln_attn.weight")
        self.norm = LayerNorm(w / ("ln_attn" if two else "input_layernorm"), c.norm_eps)
        self.attn = attention(c, w / "self_attention", layer, positions)
        self.mlp_norm = LayerNorm(w / "ln_mlp", c.norm_eps) if two else None
        self.mlp = MLP(w / "mlp", "dense_h_to_4h", "dense_4h_to_h", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        normed = self.norm(x)
        return x + self.attn(normed, ctx) + self.mlp(self.mlp_norm(x) if self.mlp_norm else normed)


class Sequential:
    def __init__(self, c: ModelConfig, w: View, layer: int, positions: Rope | Array) -> None:
        self.norm = LayerNorm(w / "input_layernorm", c.norm_eps)
        self.attn = attention(c, w / "self_attention", layer, positions)
        self.mlp_norm = LayerNorm(w / "post_attention_layernorm", c.norm_eps)
        self.mlp = MLP(w / "mlp", "dense_h_to_4h", "dense_4h_to_h", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "transformer"
        embed = Embedding(body / "word_embeddings")
        alibi = c.switch("alibi", False)
        positions = alibi_key_bias(c.heads, c.max_position_embeddings, c.head_dim) if alibi else Rope(c)
        block = Parallel if c.switch("parallel_attn", True) else Sequential
        super().__init__(
            embed=embed,
            blocks=[block(c, body / "h" / str(i), i, positions) for i in range(c.num_layers)],
            norm=LayerNorm(body / "ln_f", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
