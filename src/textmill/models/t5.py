"""T5 and Flan-T5: an encoder, and a decoder that attends to it; distances have a learned bias. Raffel et al. 2020."""

from __future__ import annotations

from textmill.kernels.spec import Array
from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, Logits, head
from textmill.layers.encoder import CrossAttention, TwoWayAttention
from textmill.layers.linear import row
from textmill.layers.memory import Memory
from textmill.layers.mlp import MLP, GatedMLP
from textmill.layers.norm import RMSNorm
from textmill.layers.positions import distance_bias
from textmill.layers.types import Context, EncoderContext, Hidden
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


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int, bias: Array) -> None:
        attn = w / 0 / "SelfAttention"
        self.norm = RMSNorm(w / 0 / "layer_norm", c.norm_eps)
        self.attn = Attention(c, qkv(c, attn, "q", "k", "v"), row(attn, "o"), layer, scale=1.0, relative=bias)
        self.cross_norm = RMSNorm(w / 1 / "layer_norm", c.norm_eps)
        self.cross = CrossAttention(c, w / 1 / "EncDecAttention", layer, "q", "k", "v", "o", scale=1.0)
        self.mlp_norm = RMSNorm(w / 2 / "layer_norm", c.norm_eps)
        self.mlp = feed_forward(c, w / 2)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.attn(self.norm(x), ctx)
        x = x + self.cross(self.cross_norm(x), ctx)
        return x + self.mlp(self.mlp_norm(x))


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        for copy in ("encoder.embed_tokens", "decoder.embed_tokens"):  # of `shared`, in some files
            w.leave_out(copy)
        w.leave_out("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias")  # of no use, in the oldest
        embed = Embedding(w / "shared")
        stacks = [w / name / "block" for name in ("encoder", "decoder")]
        encoder_bias, bias = (distance_bias(c, w / 0 / "layer.0.SelfAttention", both=w is stacks[0]) for w in stacks)
        layers = range(c.raw["num_layers"])
        self.encoder = [EncoderBlock(c, stacks[0] / i / "layer", encoder_bias) for i in layers]
        self.encoder_norm = RMSNorm(w / "encoder.final_layer_norm", c.norm_eps)
        self.decoder = [Block(c, stacks[1] / i / "layer", i, bias) for i in range(c.num_layers)]
        scale = c.hidden_size**-0.5 if c.switch("scale_decoder_outputs", True) else 1.0
        norm = RMSNorm(w / "decoder.final_layer_norm", c.norm_eps)
        self.words = embed
        super().__init__(embed, self.decoder, norm, Logits(head(w / "lm_head", embed), scale=scale))

    @property
    def memory(self) -> Memory:
        return Memory(
            attention=tuple(block.attn.spec for block in self.decoder),
            encoded=tuple(block.cross.spec for block in self.decoder),
        )

    def encode(self, ctx: EncoderContext) -> list[Hidden]:
        x = self.words(ctx)
        for block in self.encoder:
            x = block(x, ctx)
        x = self.encoder_norm(x)
        return [block.cross.remember(x) for block in self.decoder]
