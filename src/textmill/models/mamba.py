"""Mamba: no attention and no MLP, one state-space mixer a layer behind an RMS norm. Gu and Dao 2023."""

from __future__ import annotations

from textmill.layers.causal_lm import CausalLM
from textmill.layers.embedding import Embedding, head
from textmill.layers.memory import Memory
from textmill.layers.norm import RMSNorm
from textmill.layers.state_space import StateSpaceMixer
from textmill.layers.types import Context, Hidden
from textmill.weights.config import ModelConfig
from textmill.weights.view import View


class Block:
    def __init__(self, c: ModelConfig, w: View, layer: int) -> None:
        self.norm = RMSNorm(w / "norm", c.norm_eps)
        self.mixer = StateSpaceMixer(w / "mixer", layer)

    def __call__(self, x: Hidden, ctx: Context) -> Hidden:
        return x + self.mixer(self.norm(x), ctx)


class Model(CausalLM):
    def __init__(self, c: ModelConfig, w: View) -> None:
        body = w / "backbone"
        # The authors' own files say `embedding`.
        embed = Embedding(body / ("embedding" if body.has("embedding.weight") else "embeddings"))
        blocks = [Block(c, body / "layers" / i, i) for i in range(c.num_layers)]
        super().__init__(embed, blocks, RMSNorm(body / "norm_f", c.norm_eps), head(w / "lm_head", embed))
        self.states = tuple(shape for block in blocks for shape in block.mixer.states)

    @property
    def memory(self) -> Memory:
        return Memory(states=self.states)
