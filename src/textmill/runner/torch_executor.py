"""A step in plain torch, on any device: slow, and the meaning of what the native program computes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from textmill.core import Sampled, SlotWork
from textmill.kernels import reference
from textmill.kernels.native import NativeWeight
from textmill.kernels.spec import Array, AttentionSpec
from textmill.layers.causal_lm import CausalLM
from textmill.layers.types import Hidden, Stored
from textmill.quant.packed import Packed
from textmill.runner.choosing import finish, wanted_count, wanted_rows
from textmill.runner.slots import SlotTables


def bytes_per_block(model: CausalLM, block_size: int) -> int:
    """Keys and values of one block in all layers, float32."""
    return sum(2 * spec.kv_heads * spec.head_dim * block_size * 4 for spec in model.attention_layers)


class EagerContext:
    """One step as the layers of an eager model see it."""

    def __init__(self, work: Sequence[SlotWork], tables: SlotTables, cache: list[tuple[Tensor, Tensor]]) -> None:
        self._work = [(w.slot, w.start, w.count) for w in work]
        self._block_table = torch.from_numpy(tables.block_table)
        self._cache = cache
        known = [torch.from_numpy(tables.tokens[w.slot, w.start : w.start + w.count]).long() for w in work]
        self._tokens = torch.cat(known)
        self._positions = torch.cat([torch.arange(w.start, w.start + w.count) for w in work])
        self._wanted = torch.tensor(wanted_rows(work, tables), dtype=torch.int64)

    def embed(self, table: Stored, scale: float = 1.0) -> Tensor:
        matrix = table.form_for(self._tokens)
        if isinstance(matrix, Packed):
            return torch.from_numpy(matrix.take(self._tokens.numpy()).dequantize()) * scale
        if isinstance(matrix, NativeWeight):
            raise TypeError("an eager step needs a plain table")
        return torch.as_tensor(matrix)[self._tokens] * scale

    def embed_positions(self, table: Array, offset: int = 0) -> Tensor:
        return reference.floats(table)[self._positions + offset]

    def attend(self, qkv: Hidden, layer: int, spec: AttentionSpec) -> Tensor:
        keys, values = self._cache[layer]
        return reference.attend(qkv, keys, values, self._block_table, self._work, spec)

    def outputs(self, x: Hidden) -> Tensor:
        return x[self._wanted]


class TorchExecutor:
    """Runs the model's own Python on every step; keys and values are float32."""

    dtype = "float32"
    weight_bytes = 0
    buffer_bytes = 0

    def __init__(
        self, model: CausalLM, max_slots: int, max_total_tokens: int, block_size: int, num_blocks: int
    ) -> None:
        self.tables = SlotTables(max_slots, max_total_tokens, block_size)
        self.compute_seconds = 0.0
        self.logits = torch.empty(0)  # of the last step's wanted rows, for tests
        self._model = model
        self._cache = [
            (torch.zeros(shape), torch.zeros(shape))
            for shape in ((num_blocks, s.kv_heads, block_size, s.head_dim) for s in model.attention_layers)
        ]

    @torch.inference_mode()
    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        started = time.perf_counter()
        logits = self._model(EagerContext(work, self.tables, self._cache))
        self.compute_seconds += time.perf_counter() - started
        self.logits = logits
        out: list[Sampled] = []
        row = 0
        for item in work:
            rows = wanted_count(item, self.tables)
            out.append(finish(item, logits[row : row + rows], self.tables))
            row += rows
        return out
