"""Steps of a program back to back: a native thread starts the next one the moment the one before it ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from textmill import _native
from textmill.kernels.native import Program, StepArrays


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that left the queue. `arrays` are filled unless it was held."""

    arrays: StepArrays
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
        self._native = _native.StepQueue(program.handle, self.failed)
        self._waiting: deque[StepArrays] = deque()

    def submit(self, work: NDArray[np.int32]) -> None:
        """As `Program.run`. What the slot tables say of the step's slots may not change until it is collected."""
        arrays = self._program.room_for(work)
        self._native.submit(work, *arrays.columns())
        self._waiting.append(arrays)

    def collect(self) -> Ran:
        """Waits for the oldest step. Raises ValueError if it could not run at all."""
        seconds, held, error = self._native.collect()
        arrays = self._waiting.popleft()
        self._program.compute_seconds += seconds
        if error:
            raise ValueError(error)
        return Ran(arrays, seconds, held)

    def go_on(self) -> None:
        """Lets the steps run that wait behind one that was held or could not run."""
        self._native.go_on()
