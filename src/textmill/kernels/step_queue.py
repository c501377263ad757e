"""Steps of a program back to back: a native thread starts the next one the moment the one before it ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from textmill import _native
from textmill.kernels.native import Program
from textmill.kernels.step_results import StepLists


class Ran(NamedTuple):
    """A step that left the queue. The results are filled unless it was held."""

    results: StepLists
    seconds: float
    held: bool


class StepQueue:
    """Runs what `submit` brings in order; `collect` takes the results in order.

    `failed` [slots] is set to 1 for slots whose rows failed, and for all slots of a step that could not run. A step
    with a row of such a slot is not run but held. After a step that was held or could not run, those behind it wait
    for `go_on`; until then, and whenever everything is collected, the program's own `run` may be used.
    """

    def __init__(self, program: Program) -> None:
        self.failed = np.zeros(program.max_slots, np.uint8)
        self._program = program
        self._native = _native.StepQueue(program.handle, self.failed, program.max_top_n)

    def submit(self, work: list[tuple[int, int, int, int]]) -> None:
        """As `Program.run`. What the slot tables say of the step's slots may not change until it is collected."""
        self._native.submit(work)

    def collect(self) -> Ran:
        """Waits for the oldest step. Raises ValueError if it could not run at all."""
        seconds, held, error, tokens, logprobs, errors, tops, prompt_logprobs = self._native.collect()
        self._program.compute_seconds += seconds
        if error:
            raise ValueError(error)
        return Ran(StepLists(tokens, logprobs, errors, tops, prompt_logprobs), seconds, held)

    def go_on(self) -> None:
        """Lets the steps run that wait behind one that was held or could not run."""
        self._native.go_on()
