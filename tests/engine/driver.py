"""Drives a scheduler as the engine does, one step ahead, and holds every request to the tokens it gets alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from scripted import ScriptedRunner, expected_choices

from textmill.core import Emission, Finish, Request, RunnerLimits, Step, TokenChoice
from textmill.engine.admission import longest_total, refusal
from textmill.engine.scheduler import EngineSettings, Scheduler
from textmill.engine.sequence import Sequence, State
from textmill.engine.stats import Counters


@dataclass
class Watched:
    sequence: Sequence
    choices: list[TokenChoice] = field(default_factory=list)
    finish: Finish = Finish.NONE
    first: Emission | None = None
    may_fail: bool = False

    @property
    def tokens(self) -> list[int]:
        return [choice.id for choice in self.choices]


class Driver:
    def __init__(self, limits: RunnerLimits, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        self.limits = limits
        self.runner = ScriptedRunner(limits)
        self.counters = Counters()
        self.scheduler = Scheduler(limits, settings, self.counters)
        self.total = longest_total(limits, settings.max_total_tokens)
        self.ahead = settings.steps_ahead
        self.in_flight: deque[Step] = deque()
        self.watched: list[Watched] = []

    def arrive(
        self,
        tokens: Iterable[int],
        new: int,
        stop: tuple[int, ...] = (),
        prompt_logprobs: bool = False,
        salt: bytes = b"",
    ) -> Watched | None:
        """Submit; None if admission refuses."""
        number = len(self.watched) + 1
        request = Request(
            id=number,
            tokens=tuple(tokens),
            max_new_tokens=new,
            stop_tokens=stop,
            prompt_logprobs=prompt_logprobs,
            cache_salt=salt,
        )
        if refusal(request, self.total, self.limits.vocab_size):
            return None
        watched = Watched(Sequence(request, number, min(self.total, len(request.tokens) + new)))
        self.watched.append(watched)
        self.scheduler.add(watched.sequence)
        return watched

    def cancel(self, watched: Watched) -> None:
        if watched.sequence.state is not State.FINISHED:
            self._take([self.scheduler.cancel(watched.sequence)])

    def turn(self) -> None:
        step = self.scheduler.schedule()
        if step is not None:
            self._launch(step)
        assert step is not None or self.in_flight or not self.scheduler.busy, "nothing moves"
        if self.in_flight and (step is None or len(self.in_flight) > self.ahead):
            self._settle()
        self.scheduler.check()

    def break_launch(self) -> None:
        """A step that cannot even start."""
        step = self.scheduler.schedule()
        if step is not None:
            self._expect_failures(step)
            self._take(self.scheduler.fail(step, "boom"))

    def break_step(self, rows: set[int] | None) -> None:
        """A step that raises (None), or in which these rows fail; the next one may be launched before that shows."""
        step = self.scheduler.schedule()
        if step is None:
            return
        self._expect_failures(step)
        broken = step.number

        def script(step: Step) -> set[int]:
            if step.number == broken and rows is None:
                raise RuntimeError("boom")
            return rows or set() if step.number == broken else set()

        self.runner.script = script
        self._launch(step)
        if len(self.in_flight) > self.ahead:
            self._settle()

    def finish(self) -> None:
        """Run until everything has ended, then check what everybody got and that nothing is held."""
        for _ in range(20000):
            if not self.scheduler.busy and not self.in_flight:
                break
            self.turn()
        assert not self.scheduler.busy
        assert self.scheduler.pool.used == 0
        for watched in self.watched:
            self._check_outcome(watched)

    def _expect_failures(self, step: Step) -> None:
        rows = {work.slot for work in step.work}
        for watched in self.watched:
            watched.may_fail |= watched.sequence.slot in rows

    def _launch(self, step: Step) -> None:
        working = {work.slot for work in step.work}
        for sequence in self.scheduler.running:
            decodes = sequence.started and sequence.planned_length < sequence.limit and not sequence.in_flight
            assert sequence.slot in working or not decodes, "a decoding sequence was passed over"
        self.runner.submit(step)
        self.in_flight.append(step)

    def _settle(self) -> None:
        step = self.in_flight.popleft()
        try:
            result = self.runner.collect()
        except RuntimeError as error:
            self._take(self.scheduler.fail(step, str(error)))
        else:
            self._take(self.scheduler.update(step, result))

    def _take(self, events: list[tuple[Sequence, Emission]]) -> None:
        for sequence, emission in events:
            watched = self.watched[sequence.number - 1]
            assert not watched.finish, "something came after the end"
            watched.first = watched.first or emission
            watched.choices += emission.tokens
            watched.finish = emission.finish
            assert watched.first is emission or emission.prompt_logprobs is None

    def _check_outcome(self, watched: Watched) -> None:
        request = watched.sequence.request
        alone = expected_choices(request, self.limits.vocab_size, self.total)
        if watched.finish in (Finish.CANCELLED, Finish.FAILED):
            assert watched.choices == alone[: len(watched.choices)]
            assert watched.finish is Finish.CANCELLED or watched.may_fail
            return
        assert watched.choices == alone
        at_limit = len(request.tokens) + len(alone) == watched.sequence.limit
        assert watched.finish is (Finish.LENGTH if at_limit else Finish.EOS)
        assert watched.first is not None
        logprobs = watched.first.prompt_logprobs
        assert (logprobs is not None) == request.prompt_logprobs
        if logprobs is not None:
            assert list(logprobs[1:]) == [-float(token) for token in request.tokens[1:]]
