"""T5 and Flan-T5: an encoder, and a decoder that attends to it; distances have a learned bias. Raffel et al. 2020."""

from __future__ import annotations

from textmill.kernels.spec import Array
from textmill.layers.attention import Attention, qkv
from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, Logits, head
from textmill.layers.encoder import CrossAttention
from textmill.layers.linear import row
from textmill.layers.memory import Memory
from textmill.layers.norm import RMSNorm
from textmill.layers.positions import distance_bias
from textmill.layers.types import Context, EncoderContext, Hidden
from textmill.models.t5_encoder import Encoder, feed_forward
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


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
        self.encoder = Encoder(c, w / "encoder", embed, c.raw["num_layers"])
        blocks = w / "decoder.block"
        bias = distance_bias(c, blocks / 0 / "layer.0.SelfAttention", both=False)
        self.decoder = [Block(c, blocks / i / "layer", i, bias) for i in range(c.num_layers)]
        scale = c.hidden_size**-0.5 if c.switch("scale_decoder_outputs", True) else 1.0
        norm = RMSNorm(w / "decoder.final_layer_norm", c.norm_eps)
        super().__init__(embed, self.decoder, norm, Logits(head(w / "lm_head", embed), scale=scale))

    @property
    def memory(self) -> Memory:
        return Memory(
            attention=tuple(block.attn.spec for block in self.decoder),
            encoded=tuple(block.cross.spec for block in self.decoder),
        )

    def encode(self, ctx: EncoderContext) -> list[Hidden]:
        x = self.encoder(ctx)
        return [block.cross.remember(x) for block in self.decoder]
