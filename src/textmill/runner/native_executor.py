"""A step on the CPU as one native call: the model is recorded once, the program runs for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from textmill.core import Sampled, SlotWork, TokenChoice
from textmill.kernels.native import NativeWeight, Program, Rows
from textmill.kernels.spec import AttentionSpec
from textmill.layers.causal_lm import CausalLM
from textmill.layers.types import Hidden, Stored

NOT_FINITE = "the model's output for this request is not a finite number"


class Recorder:
    """The context of the recording: layers write their operations into a program instead of computing.

    The handles that go through the model stand where its types say tensors (see `layers.types.Hidden`).
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def embed(self, table: Stored, scale: float = 1.0) -> Hidden:
        weight = table.form_for(None)
        if not isinstance(weight, NativeWeight):
            raise TypeError("a recording needs native weights")
        return cast(Hidden, self._program.embed(weight, scale))

    def attend(self, qkv: Hidden, layer: int, spec: AttentionSpec) -> Hidden:
        return cast(Hidden, self._program.attend(cast(Rows, qkv), layer, spec))

    def outputs(self, x: Hidden) -> Hidden:
        return cast(Hidden, self._program.outputs(cast(Rows, x)))


class NativeExecutor:
    """Runs a recorded model; the program owns the slot tables, the key/value cache and the sampler."""

    def __init__(self, model: CausalLM, program: Program, dtype: str) -> None:
        program.finish(cast(Rows, model(Recorder(program))))
        self.program = program
        self.tables = program
        self.dtype = dtype

    @property
    def weight_bytes(self) -> int:
        return self.program.weight_bytes

    @property
    def buffer_bytes(self) -> int:
        return self.program.arena_bytes

    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        rows = np.array([(w.slot, w.start, w.count, w.samples) for w in work], dtype=np.int32)
        arrays = self.program.run(rows)
        columns = zip(
            work,
            arrays.token.tolist(),
            arrays.logprob.tolist(),
            arrays.error.tolist(),
            arrays.top_count.tolist(),
            strict=True,
        )
        out: list[Sampled] = []
        first_row = 0
        for i, (item, token, logprob, error, top_count) in enumerate(columns):
            if error:
                out.append(Sampled(item.slot, None, error=NOT_FINITE))
            else:
                top = pairs(arrays.top_ids[i], arrays.top_logprobs[i], top_count) if top_count else ()
                choice = TokenChoice(token, logprob, top) if item.samples else None
                out.append(Sampled(item.slot, choice, self._prompt_logprobs(arrays.prompt_logprobs, item, first_row)))
            first_row += item.count
        return out

    def _prompt_logprobs(self, values: NDArray[np.float32], item: SlotWork, first_row: int) -> tuple[float, ...]:
        """Of positions start+1 .. start+count, as far as those tokens were known (the last one may be the sampled)."""
        if not self.program.prompt_logprobs[item.slot]:
            return ()
        known = int(self.program.length[item.slot]) - (1 if item.samples else 0)
        count = max(0, min(item.count, known - 1 - item.start))
        return tuple(values[first_row : first_row + count].tolist())


def pairs(ids: NDArray[np.int32], logprobs: NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))
