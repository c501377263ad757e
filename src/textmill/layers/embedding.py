"""The vocabulary at both ends of a model."""

from __future__ import annotations

from textmill.layers.linear import Linear, Matrix, bias, matrix
from textmill.layers.types import Context, Hidden
from textmill.weights.view import View


class Embedding:
    """A row of the table per token, times `scale`."""

    def __init__(self, w: View, scale: float = 1.0) -> None:
        self.table: Matrix = matrix(w)
        self.scale = scale

    def __call__(self, ctx: Context) -> Hidden:
        return ctx.embed(self.table, self.scale)


def head(w: View, embedding: Embedding) -> Linear:
    """The output matrix: the checkpoint's own where it has one, else the embedding's (tied)."""
    return Linear(matrix(w), bias([w])) if w.has("weight") else Linear(embedding.table)
