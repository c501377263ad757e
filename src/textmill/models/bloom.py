"""BLOOM: ALiBi, a layer norm on the embeddings, projections stored head by head. Le Scao et al. 2022."""

from __future__ import annotations

from textmill.layers.attention import Attention, fused_qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import row
from textmill.layers.mlp import MLP
from textmill.layers.norm import LayerNorm
from textmill.layers.positions import alibi_slopes
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int) -> None:
        attn = w / "self_attention"
        qkv = fused_qkv(c, attn, "query_key_value", by_group=True)
        self.residual_is_normed = c.switch("apply_residual_connection_post_layernorm", False)
        self.norm = LayerNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(c, qkv, row(attn, "dense"), layer, alibi=alibi_slopes(c.heads))
        self.mlp_norm = LayerNorm(w / "post_attention_layernorm", c.norm_eps)
        self.mlp = MLP(w / "mlp", "dense_h_to_4h", "dense_4h_to_h", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        normed = self.norm(x)
        x = (normed if self.residual_is_normed else x) + self.attn(normed, ctx)
        normed = self.mlp_norm(x)
        return (normed if self.residual_is_normed else x) + self.mlp(normed)


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "transformer" if w.has("transformer.word_embeddings.weight") else w
        embed, embed_norm = (
            Embedding(body / "word_embeddings"),
            LayerNorm(body / "word_embeddings_layernorm", c.norm_eps),
        )
        super().__init__(
            embed=lambda ctx: embed_norm(embed(ctx)),
            blocks=[Block(c, body / "h" / str(i), i) for i in range(c.num_layers)],
            norm=LayerNorm(body / "ln_f", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
