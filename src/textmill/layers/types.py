"""What flows through a model and what it may see of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from textmill.kernels.native import NativeWeight, Rows
from textmill.kernels.spec import Array, AttentionSpec, ConvolutionSpec, ScanSpec
from textmill.quant.packed import Packed

if TYPE_CHECKING:
    from torch import Tensor

# A batch of token rows [rows, columns]. While a program is recorded it is a `kernels.native.Rows`, a handle with the
# operators that models use; models and layers are written, and checked, for tensors.
Hidden: TypeAlias = "Tensor"


def hidden(x: Tensor | Rows) -> Hidden:
    """What a kernel returned, under the name that models use."""
    return cast("Tensor", x)


class Stored(Protocol):
    """A matrix that takes the form its user needs (see `layers.linear.Matrix`); `part`: which rows of a table it is."""

    part: range | None

    def form_for(self, x: Hidden | None) -> NativeWeight | Packed | Array: ...


class Encoder(Protocol):
    """A vision tower: pixels [tiles, 3, height, width] and the picture's (height, width) to features [tokens, columns].

    `tick` is called after each part of the work, which may take seconds. ValueError or RuntimeError for pixels that it
    cannot read.
    """

    def __call__(self, pixels: Tensor, size: tuple[int, int], tick: Callable[[], None], /) -> Tensor: ...


class EncoderContext(Protocol):
    """One text as an encoder's layers see it, all of its tokens at once."""

    def embed(self, table: Stored, scale: float = 1.0) -> Hidden:
        """Rows of the embedding table for the text's tokens: [rows, table columns]."""

    def attend_both(self, qkv: Hidden, spec: AttentionSpec) -> Hidden:
        """Every row attends over all; `spec.relative` [heads, 2 n - 1]: by key minus query, -(n - 1) .. n - 1."""


class Context(Protocol):
    """A step as layers see it. Eager contexts compute, a recording one writes the operation down."""

    def embed(self, table: Stored, scale: float = 1.0) -> Hidden:
        """Rows of the embedding table for the step's tokens: [rows, table columns]."""

    def embed_positions(self, table: Array, offset: int = 0) -> Hidden:
        """Row `position + offset` of a table [positions, columns] for each of the step's tokens: [rows, columns]."""

    def attend(self, qkv: Hidden, layer: int, spec: AttentionSpec) -> Hidden:
        """Rotates and stores this step's keys and values, attends over the sequence's: [rows, heads x head_dim]."""

    def attend_encoded(self, q: Hidden, layer: int, spec: AttentionSpec) -> Hidden:
        """Attends over what the sequence's encoder remembers for a layer: [rows, heads x head_dim]."""

    def convolve(self, x: Hidden, state: int, spec: ConvolutionSpec) -> Hidden:
        """Of the first columns of x, as many as there are channels, with the sequence's last inputs (state `state`)."""

    def scan(self, x: Hidden, dt: Hidden, bc: Hidden, gate: Hidden, state: int, spec: ScanSpec) -> Hidden:
        """x, dt [rows, channels], bc [rows, b | c], gated by the last columns of `gate`: [rows, channels]."""

    def place_images(self, embed: Callable[[Context], Hidden], encoder: Callable[[], Encoder]) -> Hidden:
        """What `embed` makes of the step's tokens, with an image's features in the rows that stand for it."""

    def attend_images(self, q: Hidden, layer: int, heads: int, encoder: Callable[[], Encoder]) -> Hidden:
        """Each row [heads x d] attends to the image it sees, the last that began: zeros where there is none.

        The encoder's features are keys and values then: [layers, keys, k | v].
        """

    def outputs(self, x: Hidden) -> Hidden:
        """Only the rows whose next token is wanted."""
