"""The vocabulary at both ends of a model."""

from __future__ import annotations

from collections.abc import Callable

from textmill.kernels import dispatch
from textmill.layers.linear import Linear, Matrix, bias, matrix, unit_rows
from textmill.layers.types import Context, EncoderContext, Hidden, hidden
from textmill.parallel.group import ALONE
from textmill.weights.view import View


class Embedding:
    """A row of the table per token, times `scale`. Of ranks each holds some tokens' rows and gives zeros for others."""

    def __init__(self, w: View, scale: float = 1.0) -> None:
        rows = part_of_vocabulary(w)
        self.table: Matrix = matrix(w, rows)
        self.group = ALONE if rows is None else w.group
        self.scale = scale

    def __call__(self, ctx: Context | EncoderContext) -> Hidden:
        return self.group.all_reduce(ctx.embed(self.table, self.scale))


class Gathered(Linear):
    """Logits: every rank multiplies by its tokens' rows, the first, which chooses tokens, gets those of all."""

    def __call__(self, x: Hidden) -> Hidden:
        return self.group.gather(super().__call__(x))


def head(w: View, embedding: Embedding, *, normed: bool = False) -> Linear:
    """The output matrix: the checkpoint's own where it has one, else the embedding's (tied).

    `normed`: every row divided by its length.
    """
    if not w.has("weight"):
        return Gathered(embedding.table, group=embedding.group)
    rows = part_of_vocabulary(w)
    table = matrix(w, rows).changed(unit_rows) if normed else matrix(w, rows)
    return Gathered(table, bias([w], [rows]), ALONE if rows is None else w.group)


def part_of_vocabulary(w: View) -> range | None:
    """This rank's tokens; None, all of them, where the vocabulary does not divide."""
    total = w.shape("weight")[0]
    rows = w.group.even(total)
    return None if len(rows) == total else rows


class Logits:
    """What a head gives, times `scale`, then bounded by a soft `cap` (0: not)."""

    def __init__(self, head: Callable[[Hidden], Hidden], *, scale: float = 1.0, cap: float = 0.0) -> None:
        self.head = head
        self.scale = scale
        self.cap = cap

    def __call__(self, x: Hidden) -> Hidden:
        logits = self.head(x)
        logits = logits if self.scale == 1.0 else hidden(dispatch.scale(logits, self.scale))
        return hidden(dispatch.softcap(logits, self.cap)) if self.cap else logits
