"""View: a checkpoint seen from one module, so that layers pull their weights by their own short names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textmill.errors import ModelError
from textmill.parallel.group import ALONE, Group

if TYPE_CHECKING:
    from textmill.kernels.spec import Array
    from textmill.quant.packed import Packed
    from textmill.weights.checkpoint import Checkpoint
    from textmill.weights.config import ModelConfig
    from textmill.weights.stretches import Indices


class View:
    """`w / "self_attn" / "q_proj"` is the view under that prefix; `w.matrix("weight")` reads under it.

    `group` are the ranks between which layers split what they read; they name the `rows` (outputs) and `inputs` of
    their part, and only those are read.
    """

    __slots__ = ("checkpoint", "group", "name", "transposed")

    def __init__(
        self, checkpoint: Checkpoint, name: str = "", *, transposed: bool = False, group: Group = ALONE
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.transposed = transposed
        self.group = group

    def transpose(self, wanted: bool = True) -> View:
        """This view of a checkpoint whose matrices are stored [inputs, outputs]: they come as [outputs, inputs]."""
        return View(self.checkpoint, self.name, transposed=self.transposed != wanted, group=self.group)

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def __truediv__(self, part: str | int) -> View:
        return View(self.checkpoint, self.path(str(part)), transposed=self.transposed, group=self.group)

    def path(self, leaf: str) -> str:
        """The whole name of something under this view."""
        return f"{self.name}.{leaf}" if self.name else leaf

    def has(self, leaf: str) -> bool:
        return self.checkpoint.has(self.path(leaf))

    def shape(self, leaf: str) -> tuple[int, ...]:
        shape = self.checkpoint.shape(self.path(leaf))
        return shape[::-1] if self.transposed else shape

    def tensor(self, leaf: str, rows: Indices | None = None) -> Array:
        return self.checkpoint.tensor(self.path(leaf), rows)

    def matrix(self, leaf: str, rows: Indices | None = None, inputs: Indices | None = None) -> Packed | Array:
        if not self.transposed:
            return self.checkpoint.matrix(self.path(leaf), rows, inputs)
        matrix = self.checkpoint.matrix(self.path(leaf), inputs, rows)
        if not hasattr(matrix, "T"):
            raise ModelError(f"{self.path(leaf)}: a packed matrix cannot be stored [inputs, outputs]")
        return matrix.T

    def leave_out(self, leaf: str) -> None:
        """The model has no use for what lies under `leaf`: it is not missed."""
        self.checkpoint.leave_out(self.path(leaf) + ".")

    def __repr__(self) -> str:
        return f"View({self.name!r})"
