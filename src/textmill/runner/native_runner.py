"""A runner whose steps follow each other natively: the next one is there while one runs, with no Python between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from textmill.core import RunnerLimits, Sampled, SlotWork, Step, StepResult
from textmill.kernels.step_queue import Ran, StepQueue
from textmill.runner.native_executor import NativeExecutor, rows_of
from textmill.runner.runner import lost
from textmill.runner.slots import apply


class NativeRunner:
    """Runs steps on the queue's thread. A step that raises comes back as that exception; the next ones go on.

    A step that admits or releases waits in `submit` until the steps before it are done: they still use the slots.
    Slots of a lost step, and those whose row failed, are void until they are admitted anew: rows that later steps
    planned for them get an error.
    """

    def __init__(self, executor: NativeExecutor, limits: RunnerLimits) -> None:
        self.limits = limits
        self._executor = executor
        self._queue = StepQueue(executor.program)
        self._submitted: deque[tuple[Step, float]] = deque()  # and what handing it over took
        self._finished: deque[StepResult | Exception] = deque()

    @property
    def alive(self) -> bool:
        """No step takes the runner along."""
        return True

    @property
    def progress_ns(self) -> int:
        return self._executor.progress_ns

    def submit(self, step: Step) -> None:
        if step.admissions or step.releases or any(item.draft for item in step.work):
            while self._submitted:
                self._finish_oldest()
            for admission in step.admissions:
                self._queue.failed[admission.slot] = 0
        begin = time.perf_counter()
        apply(step, self._executor.tables)
        self._queue.submit(rows_of(step.work))
        self._submitted.append((step, time.perf_counter() - begin))

    def collect(self) -> StepResult:
        """The oldest submitted step's result; blocks until it is there. Raises what the step raised."""
        if not self._finished:
            self._finish_oldest()
        result = self._finished.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """The thread ends with the queue; a step in it is waited for."""
        while self._submitted:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        step, spent = self._submitted.popleft()
        ran = None
        try:
            ran = self._queue.collect()
            self._finished.append(self._result(step, ran, spent))
        except Exception as error:  # noqa: BLE001 - the boundary: one broken step must not end the runner
            self._queue.failed[[item.slot for item in step.work]] = 1
            self._finished.append(error)
        if ran is None or ran.held:
            self._queue.go_on()

    def _result(self, step: Step, ran: Ran, spent: float) -> StepResult:
        begin, executor = time.perf_counter(), self._executor
        sampled = self._without_lost(step.work) if ran.held else executor.answers(step.work, ran.results)
        for place, item in enumerate(step.work):
            if item.draft and sampled[place].error and not ran.held:
                sampled[place] = self._without_guesses(item)
        spent += time.perf_counter() - begin
        return StepResult(step.number, tuple(sampled), ran.seconds + spent, ran.seconds)

    def _without_lost(self, work: Sequence[SlotWork]) -> list[Sampled]:
        """A held step, run here for the rows whose slots did not fail: the queue rests until `go_on`."""
        failed = self._queue.failed
        living = [item for item in work if not failed[item.slot]]
        sampled = iter(self._executor.run(living) if living else ())
        answers = [lost(item.slot) if failed[item.slot] else next(sampled) for item in work]
        for answer in answers:
            failed[answer.slot] |= bool(answer.error)
        return answers

    def _without_guesses(self, item: SlotWork) -> Sampled:
        """A row that failed with guesses behind it is computed again: a guess may be what is not finite."""
        alone = replace(item, count=item.count - len(item.draft), draft=())
        [answer] = self._executor.run((alone,))
        self._queue.failed[item.slot] = bool(answer.error)
        return answer
