"""Any causal language model that transformers knows, as transformers computes it, behind our engine: slow, but served.

One sequence state per slot (a transformers cache) in place of paged keys and values; a batch is a loop over slots.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from textmill.core import Sampled, SlotWork
from textmill.runner.choosing import finish, wanted_count
from textmill.runner.slots import SlotTables
from textmill.weights.config import ModelConfig

log = logging.getLogger(__name__)

# The names under which transformers' models return what they keep of a sequence, and take it again.
STATES = ("past_key_values", "cache_params", "state")
# Cache layers that take further chunks of any length; others take a first chunk, and then one token at a time.
EXTENDABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")


def bytes_per_token(c: ModelConfig) -> int:
    """Keys and values of one token in all layers, float32: the most that a state grows by."""
    return 2 * c.num_layers * c.kv_heads * c.head_dim * 4


class HubState:
    """What the model keeps of one slot's tokens: the first `computed` of them."""

    __slots__ = ("computed", "kept")

    def __init__(self) -> None:
        self.computed = 0
        self.kept: Any = None


class HubExecutor:
    """Runs a transformers model slot by slot. A slot's work starts at 0 or where its last work ended.

    A model whose state takes no further chunks gets a prompt as a whole, with the last chunk; one that keeps no state
    computes every sequence from its beginning at every step.
    """

    dtype = "float32"
    buffer_bytes = 0
    progress_ns = 0  # when the last item began

    def __init__(self, model: Any, max_slots: int, max_total_tokens: int, block_size: int) -> None:
        self.tables = SlotTables(max_slots, max_total_tokens, block_size)
        self.compute_seconds = 0.0
        self.weight_bytes = int(model.get_memory_footprint())
        self._model = model
        self._arguments = set(inspect.signature(model.forward).parameters)
        self._states: dict[int, HubState] = {}
        self.state_name, self.takes_chunks = self._probe()

    @torch.inference_mode()
    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        for slot in [slot for slot in self._states if not self.tables.length[slot]]:
            del self._states[slot]  # released
        return [self._run_one(item) for item in work]

    def _run_one(self, item: SlotWork) -> Sampled:
        """An item that the model's code cannot compute fails alone."""
        self.progress_ns = time.monotonic_ns()
        try:
            return finish(item, self._compute(item), self.tables)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            log.warning("transformers' model fails in slot %d", item.slot, exc_info=error)
            self._states.pop(item.slot, None)
            return Sampled(item.slot, None, error=f"{type(error).__name__} in the model's code")

    @torch.inference_mode()
    def _probe(self) -> tuple[str, bool]:
        """The name of the model's state, "" if it keeps none, and whether that takes chunks: seen on one token."""
        output = self._call(torch.zeros((1, 1), dtype=torch.int64), None, "", 1)
        names = [name for name in STATES if name in self._arguments and getattr(output, name, None) is not None]
        if not names:
            return "", False
        layers = getattr(getattr(output, names[0]), "layers", None) or ()
        return names[0], len(layers) > 0 and all(type(layer).__name__ in EXTENDABLE for layer in layers)

    def _compute(self, item: SlotWork) -> Tensor:
        """Logits of the item's wanted rows: [rows, vocabulary], float32."""
        started = time.perf_counter()
        wanted = wanted_count(item, self.tables)
        if not wanted and not self.takes_chunks:
            return torch.empty(0)  # a later chunk computes this one too
        logits = self._extend(self._state(item), item, wanted)
        self.compute_seconds += time.perf_counter() - started
        return logits

    def _state(self, item: SlotWork) -> HubState:
        """The slot's state as far as the item can go on from it; an empty one where it cannot."""
        state = self._states.get(item.slot)
        goes_on = item.start > 0 and state is not None and state.computed == item.start
        if state is None or not goes_on or not (self.takes_chunks or item.count == 1):
            state = self._states[item.slot] = HubState()
        return state

    def _extend(self, state: HubState, item: SlotWork, wanted: int) -> Tensor:
        stop = item.start + item.count
        ids = torch.from_numpy(self.tables.tokens[item.slot, state.computed : stop]).long()[None]
        output = self._call(ids, state.kept, self.state_name, max(wanted, 1))
        if self.state_name:
            state.kept, state.computed = getattr(output, self.state_name), stop
        logits: Tensor = output.logits[0, output.logits.shape[1] - wanted :].float()
        return logits

    def _call(self, ids: Tensor, kept: Any, state_name: str, rows: int) -> Any:
        """The model's forward pass; of what not every model takes, it gets what this one does."""
        given: dict[str, Any] = {"use_cache": True, "logits_to_keep": rows}
        if kept is not None:
            given[state_name] = kept
        return self._model(
            input_ids=ids, return_dict=True, **{name: v for name, v in given.items() if name in self._arguments}
        )
