"""View: a checkpoint seen from one module, so that layers pull their weights by their own short names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textmill.kernels.spec import Array
    from textmill.quant.packed import Packed
    from textmill.weights.checkpoint import Checkpoint
    from textmill.weights.config import ModelConfig


class View:
    """`w / "self_attn" / "q_proj"` is the view under that prefix; `w.matrix("weight")` reads under it."""

    __slots__ = ("checkpoint", "name")

    def __init__(self, checkpoint: Checkpoint, name: str = "") -> None:
        self.checkpoint = checkpoint
        self.name = name

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def __truediv__(self, part: str | int) -> View:
        return View(self.checkpoint, self.path(str(part)))

    def path(self, leaf: str) -> str:
        """The whole name of something under this view."""
        return f"{self.name}.{leaf}" if self.name else leaf

    def has(self, leaf: str) -> bool:
        return self.checkpoint.has(self.path(leaf))

    def shape(self, leaf: str) -> tuple[int, ...]:
        return self.checkpoint.shape(self.path(leaf))

    def tensor(self, leaf: str) -> Array:
        return self.checkpoint.tensor(self.path(leaf))

    def matrix(self, leaf: str) -> Packed | Array:
        return self.checkpoint.matrix(self.path(leaf))

    def __repr__(self) -> str:
        return f"View({self.name!r})"
