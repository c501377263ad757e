"""A runner in this process: steps go to one thread of its own, strictly in order, and come back in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Protocol

from textmill.core import RunnerLimits, Sampled, SlotWork, Step, StepResult
from textmill.parallel.group import RankLost
from textmill.runner.profile import Profiler
from textmill.runner.slots import Tables, apply

NOT_FINITE = "the model's output for this request is not a finite number"


class Executor(Protocol):
    """Computes one step's work over the tables and samples where asked; the result is parallel to `work`."""

    @property
    def tables(self) -> Tables: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def buffer_bytes(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def compute_seconds(self) -> float:
        """Spent in kernels by all steps so far."""

    @property
    def progress_ns(self) -> int:
        """When the step that runs last finished a long part of it, by the monotonic clock; 0: steps have none."""

    def run(self, work: Sequence[SlotWork]) -> list[Sampled]: ...


class LocalRunner:
    """Runs steps on a thread. A step that raises comes back as that exception from `collect`; the next ones go on.

    Slots of a lost step are void until they are admitted anew: rows that later steps planned for them get an error.
    """

    def __init__(self, executor: Executor, limits: RunnerLimits, profiler: Profiler | None = None) -> None:
        self.limits = limits
        self._profiler = profiler
        self._executor = executor
        self._lost: set[int] = set()
        self._alive = True
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._results: SimpleQueue[StepResult | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="runner", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once no later step can succeed."""
        return self._alive and self._thread.is_alive()

    @property
    def progress_ns(self) -> int:
        return self._executor.progress_ns

    def submit(self, step: Step) -> None:
        self._steps.put(step)

    def collect(self) -> StepResult:
        """The oldest submitted step's result; blocks until it is there. Raises what the step raised."""
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._steps.put(None)
        self._thread.join()
        if self._profiler is not None:
            self._profiler.report()

    def _loop(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                self._results.put(self._run(step))
            except RankLost as error:
                self._alive = False
                self._results.put(error)
            except Exception as error:  # noqa: BLE001 - the boundary: one broken step must not end the thread
                self._lost.update(item.slot for item in step.work)
                self._results.put(error)

    def _run(self, step: Step) -> StepResult:
        started, computed = time.perf_counter(), self._executor.compute_seconds
        apply(step, self._executor.tables)
        if self._lost:
            self._lost.difference_update(admission.slot for admission in step.admissions)
        work = [item for item in step.work if item.slot not in self._lost] if self._lost else step.work
        if self._profiler is not None:
            self._profiler.begin(sum(item.count for item in work))
        sampled = iter(self._compute(work) if work else ())
        answers = tuple(lost(item.slot) if item.slot in self._lost else next(sampled) for item in step.work)
        # The step that is planned already counts on a token that a failed row did not bring.
        self._lost.update(one.slot for one in answers if one.error)
        computed = self._executor.compute_seconds - computed
        if self._profiler is not None:
            self._profiler.end(computed)
        return StepResult(step.number, answers, time.perf_counter() - started, computed)

    def _compute(self, work: Sequence[SlotWork]) -> list[Sampled]:
        """A row that fails with guesses behind it is computed again without: a guess may be what is not finite."""
        sampled = self._executor.run(work)
        for place, item in enumerate(work):
            if item.draft and sampled[place].error:
                alone = replace(item, count=item.count - len(item.draft), draft=())
                sampled[place] = self._executor.run((alone,))[0]
        return sampled


def lost(slot: int) -> Sampled:
    return Sampled(slot, None, error="an earlier step of this request was lost")
