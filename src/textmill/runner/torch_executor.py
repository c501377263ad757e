"""A step in plain torch, on any device: slow, and the meaning of what the native program computes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from textmill.core import Sampled, SlotWork, TokenChoice
from textmill.kernels import reference
from textmill.kernels.native import NativeWeight
from textmill.kernels.spec import AttentionSpec
from textmill.layers.causal_lm import CausalLM
from textmill.layers.types import Hidden, Stored
from textmill.quant.packed import Packed
from textmill.runner.runner import NOT_FINITE
from textmill.runner.slots import SlotTables, sampling_of
from textmill.sampling.sampler import choose, prompt_logprobs


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
        self._wanted = torch.tensor(wanted_rows(work, tables), dtype=torch.int64)

    def embed(self, table: Stored, scale: float = 1.0) -> Tensor:
        matrix = table.form_for(self._tokens)
        if isinstance(matrix, Packed):
            return torch.from_numpy(matrix.take(self._tokens.numpy()).dequantize()) * scale
        if isinstance(matrix, NativeWeight):
            raise TypeError("an eager step needs a plain table")
        return torch.as_tensor(matrix)[self._tokens] * scale

    def attend(self, qkv: Hidden, layer: int, spec: AttentionSpec) -> Tensor:
        keys, values = self._cache[layer]
        return reference.attend(qkv, keys, values, self._block_table, self._work, spec)

    def outputs(self, x: Hidden) -> Tensor:
        return x[self._wanted]


def wanted_rows(work: Sequence[SlotWork], tables: SlotTables) -> list[int]:
    """Rows whose logits are needed: all of a slot with prompt log-probabilities, else those that sample."""
    rows: list[int] = []
    first = 0
    for item in work:
        if tables.prompt_logprobs[item.slot]:
            rows += range(first, first + item.count)
        else:
            rows += range(first + item.count - sampling_rows(item), first + item.count)
        first += item.count
    return rows


def sampling_rows(item: SlotWork) -> int:
    """Rows at the end of the item after which a token is chosen: that of the newest known token, and the guesses'."""
    return 1 + len(item.draft) if item.samples else 0


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
            rows = item.count if self.tables.prompt_logprobs[item.slot] else sampling_rows(item)
            out.append(self._finish(item, logits[row : row + rows]))
            row += rows
        return out

    def _finish(self, item: SlotWork, logits: Tensor) -> Sampled:
        """Log-probabilities of the prompt tokens the rows predicted, then the next token, or tokens."""
        slot, tables = item.slot, self.tables
        known = torch.from_numpy(tables.tokens[slot, : tables.length[slot]])
        scored: tuple[float, ...] = ()
        if tables.prompt_logprobs[slot]:
            following = known[item.start + 1 : item.start + 1 + item.count]
            scored = tuple(prompt_logprobs(logits[: len(following)], following).tolist())
        if not item.samples:
            return Sampled(slot, None, scored)
        chosen = self._choose(item, logits[-sampling_rows(item) :], len(known))
        if not chosen:
            return Sampled(slot, None, scored, NOT_FINITE)
        tables.length[slot] += len(chosen)
        tables.tokens[slot, len(known) : tables.length[slot]] = [token.id for token in chosen]
        return Sampled(slot, chosen[0], scored, more=tuple(chosen[1:]))

    def _choose(self, item: SlotWork, logits: Tensor, length: int) -> list[TokenChoice]:
        """A token after the newest known one and after every right guess; none after a row that is not finite."""
        slot, tables = item.slot, self.tables
        tokens = torch.from_numpy(tables.tokens[slot])
        chosen: list[TokenChoice] = []
        for row, guess in enumerate((*item.draft, None)):
            known = [tokens[: length + row]]
            token = choose(logits[row : row + 1], [sampling_of(tables, slot)], known, [int(tables.top_n[slot])])[0]
            if token is None:
                break
            chosen.append(token)
            if token.id != guess:
                break
        return chosen
