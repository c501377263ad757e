"""Rows of embedding tables, whatever form they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from textmill.kernels.native import NativeWeight
from textmill.layers.types import Stored
from textmill.quant.packed import Packed


def looked_up(table: Stored, tokens: Tensor) -> Tensor:
    """The tokens' rows, float32; zeros for tokens whose rows another rank holds."""
    if table.part is None:
        return stored_rows(table, tokens)
    rows = tokens - table.part.start
    ours = (rows >= 0) & (rows < len(table.part))
    return torch.where(ours[:, None], stored_rows(table, rows.where(ours, 0)), 0.0)


def stored_rows(table: Stored, rows: Tensor) -> Tensor:
    matrix = table.form_for(rows)
    if isinstance(matrix, Packed):
        return torch.from_numpy(matrix.take(rows.numpy()).dequantize())
    if isinstance(matrix, NativeWeight):
        raise TypeError("an eager step needs a plain table")
    return torch.as_tensor(matrix)[rows]
