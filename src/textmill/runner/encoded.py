"""What an encoder made of running sequences' sources: keys and values by slot, from its first step on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textmill.core import SlotWork
from textmill.kernels import reference
from textmill.kernels.spec import AttentionSpec
from textmill.layers.causal_lm import Encoding
from textmill.layers.types import Hidden, Stored
from textmill.runner.lookup import looked_up

Source = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EagerEncoderContext:
    """One source as the layers of an encoder see it; `tokens` int64 [rows]."""

    tokens: Tensor

    def embed(self, table: Stored, scale: float = 1.0) -> Tensor:
        return looked_up(table, self.tokens) * scale

    def attend_both(self, qkv: Hidden, spec: AttentionSpec) -> Tensor:
        return reference.attend_both(qkv, spec)


class Encoded:
    """`sources`: by slot, what the sequences there gave their encoder to read; whoever owns it keeps it up to date."""

    def __init__(self, model: object, sources: dict[int, Source]) -> None:
        self._model = model if isinstance(model, Encoding) else None
        self._sources = sources
        self._made: dict[int, tuple[Source, list[Tensor]]] = {}

    def refresh(self, work: Sequence[SlotWork]) -> None:
        """Encodes what sequences that are new in their slots brought, each on its own; forgets those that left."""
        if self._model is None:
            return
        for slot in [slot for slot in self._made if slot not in self._sources]:
            del self._made[slot]
        for item in work:
            source = self._sources[item.slot]
            made = self._made.get(item.slot)
            if made is None or made[0] is not source:
                context = EagerEncoderContext(torch.tensor(source, dtype=torch.int64))
                self._made[item.slot] = source, self._model.encode(context)

    def attend(self, q: Tensor, work: Sequence[tuple[int, int, int]], layer: int, spec: AttentionSpec) -> Tensor:
        """The rows q [rows, heads x head_dim] of the slots of `work`, each over its slot's encoder output."""
        rows = torch.split(q, [count for _, _, count in work])
        made = [self._made[slot][1][layer] for slot, _, _ in work]
        return torch.cat([reference.attend_encoded(*pair, spec) for pair in zip(rows, made, strict=True)])
