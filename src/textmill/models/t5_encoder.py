"""T5's encoder: blocks that look both ways, whose distances have a learned bias. Raffel et al. 2020."""

from __future__ import annotations

from textmill.kernels.spec import Array
from textmill.layers.embedding import Embedding
from textmill.layers.encoder import TwoWayAttention
from textmill.layers.mlp import MLP, GatedMLP
from textmill.layers.norm import RMSNorm
from textmill.layers.positions import distance_bias
from textmill.layers.types import EncoderContext, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


def feed_forward(c: ModelConfig, w: View) -> GatedMLP | MLP:
    w = w / "DenseReluDense"
    if w.has("wi_0.weight"):
        return GatedMLP(w, "wi_0", "wi_1", "wo", c.hidden_act)
    return MLP(w, "wi", "wo", c.hidden_act)


class EncoderBlock:
    def __init__(self, c: ModelConfig, w: View, bias: Array) -> None:
        self.norm = RMSNorm(w / 0 / "layer_norm", c.norm_eps)
        self.attn = TwoWayAttention(c, w / 0 / "SelfAttention", "q", "k", "v", "o", scale=1.0, relative=bias)
        self.mlp_norm = RMSNorm(w / 1 / "layer_norm", c.norm_eps)
        self.mlp = feed_forward(c, w / 1)

    def __call__(self, x: Hidden, ctx: EncoderContext) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


class Encoder:
    """What an encoder makes of its tokens: [tokens, hidden_size]."""

    def __init__(self, c: ModelConfig, w: View, words: Embedding, layers: int) -> None:
        bias = distance_bias(c, w / "block.0.layer.0.SelfAttention", both=True)
        self.words = words
        self.blocks = [EncoderBlock(c, w / "block" / i / "layer", bias) for i in range(layers)]
        self.norm = RMSNorm(w / "final_layer_norm", c.norm_eps)

    def __call__(self, ctx: EncoderContext) -> Hidden:
        x = self.words(ctx)
        for block in self.blocks:
            x = block(x, ctx)
        return self.norm(x)
