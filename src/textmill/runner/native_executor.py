"""A step on the CPU as one native call: the model is recorded once, the program runs for any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, cast

import numpy as np

from textmill.core import Sampled, SlotWork, TokenChoice
from textmill.kernels.native import NativeWeight, Placed, Program, Rows, Unrecordable
from textmill.kernels.spec import Array, AttentionSpec, ConvolutionSpec, ScanSpec
from textmill.kernels.step_results import StepLists
from textmill.layers.causal_lm import CausalLM
from textmill.layers.types import Context, Encoder, Hidden, Stored
from textmill.runner.runner import NOT_FINITE


class Recorder:
    """The context of the recording: layers write their operations into a program instead of computing.

    The handles that go through the model stand where its types say tensors (see `layers.types.Hidden`). What an eager
    context has beyond these is Unrecordable.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.encoder: Encoder | None = None  # of images, if the model places any
        self.columns = 0  # of what it makes of them

    def embed(self, table: Stored, scale: float = 1.0) -> Hidden:
        weight = table.form_for(None)
        if not isinstance(weight, NativeWeight):
            raise TypeError("a recording needs native weights")
        return cast(Hidden, self._program.embed(weight, scale))

    def embed_positions(self, table: Array, offset: int = 0) -> Hidden:
        return cast(Hidden, self._program.embed_positions(table, offset))

    def attend(self, qkv: Hidden, layer: int, spec: AttentionSpec) -> Hidden:
        return cast(Hidden, self._program.attend(cast(Rows, qkv), layer, spec))

    def convolve(self, x: Hidden, state: int, spec: ConvolutionSpec) -> Hidden:
        return cast(Hidden, self._program.convolve(cast(Rows, x), spec))

    def scan(self, x: Hidden, dt: Hidden, bc: Hidden, gate: Hidden, state: int, spec: ScanSpec) -> Hidden:
        return cast(Hidden, self._program.scan(cast(Rows, x), cast(Rows, dt), cast(Rows, bc), cast(Rows, gate), spec))

    def place_images(self, embed: Callable[[Context], Hidden], encoder: Callable[[], Encoder]) -> Hidden:
        rows = cast(Rows, embed(self))
        self.encoder, self.columns = encoder(), rows.cols
        return cast(Hidden, self._program.place_rows(rows))

    def outputs(self, x: Hidden) -> Hidden:
        return cast(Hidden, self._program.outputs(cast(Rows, x)))

    def __getattr__(self, name: str) -> Any:
        raise Unrecordable(f"operation {name}")


class NativeExecutor:
    """Runs a recorded model; the program owns the slot tables, the key/value cache and the sampler."""

    def __init__(self, model: CausalLM, program: Program, dtype: str) -> None:
        """Records the model; raises Unrecordable."""
        recorder = Recorder(program)
        program.finish(cast(Rows, model(recorder)))
        self._seeing = None if recorder.encoder is None else Seeing(program, recorder.encoder, recorder.columns)
        self.memory = model.memory
        self.program = program
        self.tables = program
        self.dtype = dtype

    @property
    def weight_bytes(self) -> int:
        return self.program.weight_bytes

    @property
    def buffer_bytes(self) -> int:
        return self.program.arena_bytes + self.program.max_slots * self.memory.bytes_per_slot(0)

    @property
    def compute_seconds(self) -> float:
        return self.program.compute_seconds

    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        rows = np.array(rows_of(work), dtype=np.int32)
        return self.answers(work, self.program.run(rows, self.placed(work)).lists())

    def answers(self, work: Sequence[SlotWork], results: StepLists) -> list[Sampled]:
        """What a step that ran brought, parallel to its work."""
        choices = choices_of(results)
        out: list[Sampled] = []
        place = first_row = 0
        for item in work:
            if results.error[place]:
                out.append(Sampled(item.slot, None, error=NOT_FINITE))
            else:
                scored = self._prompt_logprobs(results.prompt_logprobs, item, first_row)
                last = place + 1 + len(item.draft)
                more = tuple([one for one in choices[place + 1 : last] if one is not None]) if item.draft else ()
                out.append(Sampled(item.slot, choices[place], scored, more=more))
            first_row += item.count
            place += 1 + len(item.draft)
        return out

    @property
    def sees(self) -> bool:
        """Whether steps have more to do than the program: images to encode."""
        return self._seeing is not None

    @property
    def progress_ns(self) -> int:
        """An image may take the tower seconds."""
        return 0 if self._seeing is None else self._seeing.progress_ns

    def placed(self, work: Sequence[SlotWork]) -> Placed | None:
        """The features of images that stand in rows of the work."""
        return None if self._seeing is None else self._seeing.placed(work)

    def _prompt_logprobs(self, values: list[float], item: SlotWork, first_row: int) -> tuple[float, ...]:
        """Of positions start+1 .. start+count, as far as those tokens were known before the step."""
        if not values or not self.program.prompt_logprobs[item.slot]:
            return ()
        known = item.start + item.count - len(item.draft) if item.samples else int(self.program.length[item.slot])
        count = max(0, min(item.count, known - 1 - item.start))
        return tuple(values[first_row : first_row + count])


class Seeing:
    """Images of a recorded model: a tower in torch encodes them, the program takes their features for embeddings."""

    def __init__(self, program: Program, encoder: Encoder, columns: int) -> None:
        from textmill.runner.pictures import Pictures

        program.images = {}
        self._images = program.images
        self._pictures = Pictures(program.images)
        self._encoder = encoder
        self._columns = columns

    @property
    def progress_ns(self) -> int:
        return self._pictures.progress_ns

    def placed(self, work: Sequence[SlotWork]) -> Placed | None:
        if not self._images:
            return None
        items = [(one.slot, one.start, one.count) for one in work]
        return self._pictures.rows(items, self._columns, self._encoder)


def rows_of(work: Sequence[SlotWork]) -> list[tuple[int, int, int, int]]:
    """The work as a program takes it: (slot, start, count, samples) each."""
    return [(w.slot, w.start, w.count, w.samples + len(w.draft)) for w in work]


def choices_of(results: StepLists) -> list[TokenChoice | None]:
    """A choice per place; None where no token was chosen or a wrong guess came before."""
    tops = map(tuple, results.tops) if results.tops else repeat(())
    columns = zip(results.token, results.logprob, tops, strict=False)
    return [TokenChoice(token, logprob, top) if token >= 0 else None for token, logprob, top in columns]
