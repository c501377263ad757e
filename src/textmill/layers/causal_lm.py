"""The outline every decoder shares: embed, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from textmill.kernels.spec import AttentionSpec
from textmill.layers.attention import Attention
from textmill.layers.types import Context, Hidden


class Block(Protocol):
    """One layer of a decoder: the residual stream in, the residual stream out."""

    attn: Attention

    def __call__(self, x: Hidden, ctx: Context) -> Hidden: ...


class CausalLM:
    """Logits [wanted rows, vocabulary] of a step. A family's file names the parts."""

    def __init__(
        self,
        embed: Callable[[Context], Hidden],
        blocks: Sequence[Block],
        norm: Callable[[Hidden], Hidden],
        head: Callable[[Hidden], Hidden],
    ) -> None:
        self.embed = embed
        self.blocks = blocks
        self.norm = norm
        self.head = head

    def __call__(self, ctx: Context) -> Hidden:
        x = self.embed(ctx)
        for block in self.blocks:
            x = block(x, ctx)
        return self.head(self.norm(ctx.outputs(x)))

    @property
    def attention_layers(self) -> list[AttentionSpec]:
        """What each layer keeps of a sequence, in the order of layer numbers."""
        return [block.attn.spec for block in self.blocks]
