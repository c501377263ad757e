"""What flows through a model while it is recorded: handles, and the error for what the native program cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textmill.kernels.native import Program


class Unrecordable(Exception):
    """A model used an operation that the native program lacks; `operation` names it. Torch can serve such a model."""

    def __init__(self, operation: str) -> None:
        super().__init__(f"the native kernels have no {operation}")
        self.operation = operation


class Rows:
    """A value of a recorded program: a batch of rows with `cols` float32 columns each. Immutable.

    Whatever else a model does with it, as if it were a tensor, is Unrecordable.
    """

    __slots__ = ("cols", "index", "program")

    def __init__(self, program: Program, index: int, cols: int) -> None:
        self.program = program
        self.index = index
        self.cols = cols

    def __add__(self, other: Rows) -> Rows:
        if not isinstance(other, Rows):
            raise Unrecordable(f"sum with a {type(other).__name__}")
        return self.program.add(self, other)

    def __mul__(self, factor: float | Rows) -> Rows:
        if isinstance(factor, Rows):
            return self.program.multiply(self, factor)
        if not isinstance(factor, int | float):
            raise Unrecordable(f"product with a {type(factor).__name__}")
        return self.program.scale(self, factor)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions, which must get their usual answer
            raise AttributeError(name)
        raise Unrecordable(f"tensor operation .{name}")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any, **__: Any) -> Any:
        """What torch calls when its functions meet a handle."""
        raise Unrecordable(f"torch.{getattr(function, '__name__', function)}")


def _missing(symbol: str) -> Callable[..., Any]:
    def operator(self: Rows, *_: Any) -> Any:
        raise Unrecordable(f"operator {symbol}")

    return operator


for _name, _symbol in {
    "radd": "+", "sub": "-", "rsub": "-", "truediv": "/", "rtruediv": "/", "neg": "-", "pow": "**", "matmul": "@",
    "rmatmul": "@", "getitem": "[]", "setitem": "[] =", "len": "len", "iter": "iteration", "bool": "truth",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "abs": "abs",
}.items():  # fmt: skip
    setattr(Rows, f"__{_name}__", _missing(_symbol))
