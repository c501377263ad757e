"""A step on the CPU as one native call: the model is recorded once, the program runs for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from textmill.core import Sampled, SlotWork, TokenChoice
from textmill.kernels.native import Program, Rows
from textmill.kernels.spec import AttentionSpec
from textmill.layers.causal_lm import CausalLM
from textmill.layers.types import Stored

NOT_FINITE = "the model's output for this request is not a finite number"


class Recorder:
    """The context of the recording: layers write their operations into a program instead of computing."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def embed(self, table: Stored, scale: float = 1.0) -> Rows:
        return self._program.embed(table.form_for(None), scale)

    def attend(self, qkv: Rows, layer: int, spec: AttentionSpec) -> Rows:
        return self._program.attend(qkv, layer, spec)

    def outputs(self, x: Rows) -> Rows:
        return self._program.outputs(x)


class NativeExecutor:
    """Runs a recorded model; the program owns the slot tables, the key/value cache and the sampler."""

    def __init__(self, model: CausalLM, program: Program, dtype: str) -> None:
        program.finish(model(Recorder(program)))
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
        tokens, logprobs = arrays.token.tolist(), arrays.logprob.tolist()
        errors, top_counts = arrays.error.tolist(), arrays.top_count.tolist()
        out: list[Sampled] = []
        first_row = 0
        for i, item in enumerate(work):
            if errors[i]:
                out.append(Sampled(item.slot, None, error=NOT_FINITE))
            else:
                top = ()
                if top_counts[i]:
                    best = slice(0, top_counts[i])
                    top = tuple(
                        zip(arrays.top_ids[i, best].tolist(), arrays.top_logprobs[i, best].tolist(), strict=True)
                    )
                token = TokenChoice(tokens[i], logprobs[i], top) if item.samples else None
                out.append(Sampled(item.slot, token, self._prompt_logprobs(arrays.prompt_logprobs, item, first_row)))
            first_row += item.count
        return out

    def _prompt_logprobs(self, values: np.ndarray, item: SlotWork, first_row: int) -> tuple[float, ...]:
        """Of positions start+1 .. start+count, as far as those tokens were known (the last one may be the sampled)."""
        if not self.program.prompt_logprobs[item.slot]:
            return ()
        known = int(self.program.length[item.slot]) - (1 if item.samples else 0)
        count = max(0, min(item.count, known - 1 - item.start))
        return tuple(values[first_row : first_row + count].tolist())
