"""OPT and Galactica: learned positions from 2 on; norms before (or, 350M, after) each part. Zhang et al. 2022."""

from __future__ import annotations

from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import replicated, row
from textmill.layers.mlp import MLP
from textmill.layers.norm import LayerNorm
from textmill.layers.positions import Positions
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View

FIRST_POSITION = 2  # rows 0 and 1 of the table were for padding


def norm(c: ModelConfig, w: View) -> LayerNorm:
    return LayerNorm(w, c.norm_eps, affine=c.switch("layer_norm_elementwise_affine", True))


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int) -> None:
        attn = w / "self_attn"
        self.norm_first = c.switch("do_layer_norm_before", True)
        self.attn = Attention(c, qkv(c, attn, "q_proj", "k_proj", "v_proj"), row(attn, "out_proj"), layer)
        self.norm = norm(c, w / "self_attn_layer_norm")
        self.mlp = MLP(w, "fc1", "fc2", c.hidden_act)
        self.mlp_norm = norm(c, w / "final_layer_norm")

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        if self.norm_first:
            x = x + self.attn(self.norm(x), ctx)
            return x + self.mlp(self.mlp_norm(x))
        x = self.norm(x + self.attn(x, ctx))
        return self.mlp_norm(x + self.mlp(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "model" / "decoder" if w.has("model.decoder.embed_tokens.weight") else w / "decoder"
        embed, positions = Embedding(body / "embed_tokens"), Positions(body / "embed_positions", FIRST_POSITION)
        narrow = body.has("project_in.weight")
        widen, shrink = (replicated(body, name) if narrow else same for name in ("project_in", "project_out"))
        last = c.switch("do_layer_norm_before", True) and not c.switch("_remove_final_layer_norm", False)
        words = head(w / "lm_head", embed)
        super().__init__(
            embed=lambda ctx: widen(embed(ctx)) + positions(ctx),
            blocks=[Block(c, body / "layers" / str(i), i) for i in range(c.num_layers)],
            norm=norm(c, body / "final_layer_norm") if last else same,
            head=lambda x: words(shrink(x)),
        )


def same(x: Hidden) -> Hidden:
    return x
