"""GPT-2: learned positions, two layer norms, one matrix for queries, keys and values. Radford et al. 2019."""

from __future__ import annotations

from textmill.layers.attention import Attention, fused_qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.linear import row
from textmill.layers.mlp import MLP
from textmill.layers.norm import LayerNorm
from textmill.layers.positions import Positions
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int) -> None:
        attn = w / "attn"
        scale = c.head_dim**-0.5 if c.switch("scale_attn_weights", True) else 1.0
        scale /= layer + 1 if c.switch("scale_attn_by_inverse_layer_idx", False) else 1
        self.norm = LayerNorm(w / "ln_1", c.norm_eps)
        self.attn = Attention(c, fused_qkv(c, attn, "c_attn"), row(attn, "c_proj"), layer, scale=scale)
        self.mlp_norm = LayerNorm(w / "ln_2", c.norm_eps)
        self.mlp = MLP(w / "mlp", "c_fc", "c_proj", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "transformer" if w.has("transformer.wte.weight") else w
        embed, positions = Embedding(body / "wte"), Positions(body / "wpe")
        # The original stores [inputs, outputs]; the fused projection, never square, tells which it is.
        blocks = (body / "h").transpose((body / "h").shape("0.attn.c_attn.weight")[0] == c.hidden_size)
        super().__init__(
            embed=lambda ctx: embed(ctx) + positions(ctx),
            blocks=[Block(c, blocks / str(i), i) for i in range(c.num_layers)],
            norm=LayerNorm(body / "ln_f", c.norm_eps),
            head=head(w / "lm_head", embed),
        )
