"""A step in plain torch, on any device: slow, and the meaning of what the native program computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from textmill.core import Sampled, SlotWork
from textmill.kernels import recurrence, reference
from textmill.kernels.spec import Array, AttentionSpec, ConvolutionSpec, ScanSpec
from textmill.layers.causal_lm import CausalLM
from textmill.layers.types import Context, Encoder, Hidden, Stored
from textmill.runner.choosing import finish, wanted_count, wanted_rows
from textmill.runner.encoded import Encoded
from textmill.runner.lookup import looked_up
from textmill.runner.pictures import Pictures
from textmill.runner.slots import SlotTables


def bytes_per_block(model: CausalLM, block_size: int) -> int:
    """Keys and values of one block in all layers, float32."""
    return model.memory.bytes_per_token() * block_size


class EagerContext:
    """One step as the layers of an eager model see it. `states`: by number, [slots, ...] (see `layers.memory`)."""

    def __init__(
        self,
        work: Sequence[SlotWork],
        tables: SlotTables,
        cache: list[tuple[Tensor, Tensor]],
        states: Sequence[Tensor] = (),
        pictures: Pictures | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        self._encoded = encoded
        self._pictures = pictures or Pictures(tables.images)
        self._work = [(w.slot, w.start, w.count) for w in work]
        self._block_table = torch.from_numpy(tables.block_table)
        self._cache = cache
        self._states = states
        known = [torch.from_numpy(tables.tokens[w.slot, w.start : w.start + w.count]).long() for w in work]
        self._tokens = torch.cat(known)
        self._positions = torch.cat([torch.arange(w.start, w.start + w.count) for w in work])
        self._wanted = torch.tensor(wanted_rows(work, tables), dtype=torch.int64)

    def embed(self, table: Stored, scale: float = 1.0) -> Tensor:
        return looked_up(table, self._tokens) * scale

    def embed_positions(self, table: Array, offset: int = 0) -> Tensor:
        return reference.floats(table)[self._positions + offset]

    def attend(self, qkv: Hidden, layer: int, spec: AttentionSpec) -> Tensor:
        keys, values = self._cache[layer]
        return reference.attend(qkv, keys, values, self._block_table, self._work, spec)

    def attend_encoded(self, q: Hidden, layer: int, spec: AttentionSpec) -> Tensor:
        if self._encoded is None:
            raise TypeError("this step has no encoder")
        return self._encoded.attend(q, self._work, layer, spec)

    def convolve(self, x: Hidden, state: int, spec: ConvolutionSpec) -> Tensor:
        return recurrence.convolve(x, self._states[state], self._work, spec)

    def scan(self, x: Hidden, dt: Hidden, bc: Hidden, gate: Hidden, state: int, spec: ScanSpec) -> Tensor:
        return recurrence.scan(x, dt, bc, gate, self._states[state], self._work, spec)

    def place_images(self, embed: Callable[[Context], Hidden], encoder: Callable[[], Encoder]) -> Tensor:
        return self._pictures.place(embed(self), self._work, encoder())

    def attend_images(self, q: Hidden, layer: int, heads: int, encoder: Callable[[], Encoder]) -> Tensor:
        return self._pictures.attend(q, self._work, layer, heads, encoder())

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
        self._pictures = Pictures(self.tables.images)
        self._encoded = Encoded(model, self.tables.sources)
        self.compute_seconds = 0.0
        self.logits = torch.empty(0)  # of the last step's wanted rows, for tests
        self.memory = model.memory
        self._model = model
        self._cache = [
            (torch.zeros(shape), torch.zeros(shape))
            for shape in ((num_blocks, s.kv_heads, block_size, s.head_dim) for s in self.memory.attention)
        ]
        self._states = [torch.zeros((max_slots, *shape)) for shape in self.memory.states]
        self.buffer_bytes = sum(state.nbytes for state in self._states)

    @property
    def progress_ns(self) -> int:
        """An image may take the tower seconds."""
        return self._pictures.progress_ns

    @torch.inference_mode()
    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        self.logits = logits = self.compute(work)
        out: list[Sampled] = []
        row = 0
        for item in work:
            rows = wanted_count(item, self.tables)
            out.append(finish(item, logits[row : row + rows], self.tables))
            row += rows
        return out

    @torch.inference_mode()
    def compute(self, work: Sequence[SlotWork]) -> Tensor:
        """The logits of the wanted rows: [rows, vocabulary]; no token is chosen."""
        started = time.perf_counter()
        if self._states:
            self._clear([item.slot for item in work if item.start == 0])
        self._encoded.refresh(work)
        context = EagerContext(work, self.tables, self._cache, self._states, self._pictures, self._encoded)
        logits = self._model(context)
        self.compute_seconds += time.perf_counter() - started
        return logits

    def _clear(self, slots: list[int]) -> None:
        """Sequences that begin: whatever the slots held before is of no meaning to them."""
        for state in self._states:
            state[slots] = 0
