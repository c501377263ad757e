"""The outline every decoder shares: embed, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from textmill.layers.attention import Attention
from textmill.layers.memory import Memory
from textmill.layers.types import Context, EncoderContext, Hidden


class Block(Protocol):
    """One layer of a decoder: the residual stream in, the residual stream out."""

    def __call__(self, x: Hidden, ctx: Context) -> Hidden: ...


@runtime_checkable
class Attending(Protocol):
    """A layer that keeps keys and values."""

    attn: Attention


@runtime_checkable
class Encoding(Protocol):
    """A model with an encoder: what its decoder's layers remember of a text, [rows, k | v] by layer number."""

    def encode(self, ctx: EncoderContext) -> list[Hidden]: ...


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
    def memory(self) -> Memory:
        """What the model keeps of a sequence; layers are numbered in the order of blocks."""
        return Memory(tuple(block.attn.spec for block in self.blocks if isinstance(block, Attending)))
