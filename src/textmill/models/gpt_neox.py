"""GPT-NeoX (Pythia): partly rotated heads; attention and MLP side by side or one after the other. Black et al. 2022."""

from __future__ import annotations

from textmill.layers.attention import Attention, fused_qkv
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
        attn = w / "attention"
        qkv = fused_qkv(c, attn, "query_key_value", by_group=True)
        self.parallel = c.switch("use_parallel_residual", True)
        self.norm = LayerNorm(w / "input_layernorm", c.norm_eps)
        self.attn = Attention(c, qkv, row(attn, "dense"), layer, rope=rope)
        self.mlp_norm = LayerNorm(w / "post_attention_layernorm", c.norm_eps)
        self.mlp = MLP(w / "mlp", "dense_h_to_4h", "dense_4h_to_h", c.hidden_act)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        after = x + self.attn(self.norm(x), ctx)
        return after + self.mlp(self.mlp_norm(x if self.parallel else after))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "gpt_neox"
        embed, rope = Embedding(body / "embed_in"), Rope(c)
        super().__init__(
            embed=embed,
            blocks=[Block(c, body / "layers" / str(i), i, rope) for i in range(c.num_layers)],
            norm=LayerNorm(body / "final_layer_norm", c.norm_eps),
            head=head(w / "embed_out", embed),
        )
