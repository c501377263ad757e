"""One prompt's way through the router: permits, the sequences that the engine runs for it, and its account afterwards.

`Call` is one request in TGI's sense (a line in the log, one in the request metrics); a `Sequence` is one engine request
(one line in the ledger). A plain request has one of each, `best_of` several sequences, a list of prompts several calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from types import TracebackType
from typing import Any, TypeVar, cast

from textmill.api.exchange import SlowReader
from textmill.api.generation import Generation, TokenStep
from textmill.api.state import RouterState
from textmill.api.validation import Prompt
from textmill.core import Emission, Finish, Sampling
from textmill.errors import (
    Draining,
    GenerationFailed,
    IncompleteGeneration,
    Overloaded,
    TemplateFailed,
    TextmillError,
    Unhealthy,
)
from textmill.observe.logs import event
from textmill.observe.router_metrics import Outcome

logger = logging.getLogger("textmill.router")
ResultT = TypeVar("ResultT")
CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (Overloaded, "overloaded"),
    (TemplateFailed, "template"),
    (GenerationFailed, "generation"),
    (IncompleteGeneration, "incomplete"),
    (Unhealthy, "generation"),
    (Draining, "overloaded"),
    (TextmillError, "validation"),
    (asyncio.CancelledError, "dropped"),
    (SlowReader, "dropped"),
)


@dataclass(slots=True)
class Times:
    """Moments of one call on one clock (seconds); the engine's waiting time comes with the first token."""

    arrival: float = field(default_factory=perf_counter)
    queued: float | None = None
    batched: float | None = None
    end: float | None = None

    def first(self, now: float, queue_ns: int) -> None:
        """The first token is here: it left the queue `queue_ns` after it was queued."""
        if self.batched is None and self.queued is not None:
            self.batched = min(now, self.queued + queue_ns / 1e9)

    def ended(self) -> float:
        return perf_counter() if self.end is None else self.end

    @property
    def total(self) -> float:
        return self.ended() - self.arrival

    @property
    def validation(self) -> float:
        return (self.ended() if self.queued is None else self.queued) - self.arrival

    @property
    def queue(self) -> float:
        if self.queued is None:
            return 0.0
        return (self.ended() if self.batched is None else self.batched) - self.queued

    @property
    def inference(self) -> float:
        return 0.0 if self.batched is None else self.ended() - self.batched


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where steps can go at once: `write` them, but only while `ready`."""

    ready: Callable[[], bool]
    write: Callable[[list[TokenStep]], None]


class Sequence:
    """One engine request, from its submission to its one terminal record in the ledger."""

    def __init__(self, call: Call, prompt: Prompt, sampling: Sampling, keep: bool) -> None:
        self.call = call
        self.sampling = sampling
        self.prompt = prompt
        self.last: float | None = None
        self.outlet: Outlet | None = None
        self.clock = 0.0  # of this thread's processor, when the newest steps were made
        self.taken: list[TokenStep] | None = None  # what `_at_once` made of an emission that it left to `steps`
        seed = sampling.seed if sampling.draws else None
        self.generation = Generation(call.state.tokenizer, prompt, seed, keep)

    async def steps(self, outlet: Outlet | None = None) -> AsyncGenerator[list[TokenStep], None]:
        """The tokens as they come; the engine is done with the sequence before the last of them is given out.

        While `outlet` is ready, tokens that end nothing go there the moment they arrive, and not through the generator.
        """
        state = self.call.state
        request_id = next(state.ids)
        request = self.prompt.request(request_id, self.sampling, state.eos_ids, self.call.salt)
        ledger = state.metrics.ledger
        ledger.accept(request_id)
        outcome: Outcome = "failed"
        last: list[TokenStep] = []
        try:
            self.outlet = outlet
            take = None if outlet is None else self._at_once
            source = cast(AsyncGenerator[Emission, None], state.engine.generate(request, take))
            async with aclosing(source) as emissions:
                async for emission in emissions:
                    last = self._take(emission)
                    if self.generation.finish is not None:
                        break
                    if last:
                        given = self.clock
                        yield last  # whoever asked turns them into events and writes these
                        state.metrics.step_seconds.add(thread_time() - given, ("http",))
            if self.generation.finish is None:
                raise IncompleteGeneration
            outcome = "completed"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            ledger.close(request_id, outcome)
        yield last

    def _at_once(self, emission: Emission) -> bool:
        """Send a token on its way without waking the task that waits for it; False: this one is that task's."""
        outlet = self.outlet
        if outlet is None or emission.finish is not Finish.NONE or not outlet.ready():
            return False
        steps = self._take(emission)
        if self.generation.finish is not None:  # a stop string: the task ends the sequence
            self.taken = steps
            return False
        if steps:
            outlet.write(steps)
            self.call.state.metrics.step_seconds.add(thread_time() - self.clock, ("http",))
        return True

    def _take(self, emission: Emission) -> list[TokenStep]:
        """Clock an emission in, and turn it into steps."""
        if self.taken is not None:
            steps, self.taken = self.taken, None
            return steps
        metrics, times, began = self.call.state.metrics, self.call.times, thread_time()
        steps = self.generation.push(emission)
        self.clock = thread_time()
        metrics.step_seconds.add(self.clock - began, ("text",))
        if steps:
            now = perf_counter()
            if self.last is None:
                times.first(now, emission.queue_ns)
                metrics.first_token.observe(now - times.arrival)
                metrics.skipped_tokens.observe(emission.cached_tokens)
            else:
                metrics.between_tokens.observe(now - self.last)
            self.last = now
        return steps

    async def run(self) -> Generation:
        """The whole response at once."""
        async with aclosing(self.steps()) as steps:
            async for _ in steps:
                pass
        return self.generation


class Call:
    """One prompt from arrival to answer, as a context manager: `admit`, then `queue` or `run`; leaving it gives the
    permits back and writes the account, whatever happened."""

    def __init__(self, state: RouterState, route: str, salt: bytes) -> None:
        self.state = state
        self.route = route
        self.salt = salt
        self.held = 0
        self.asked = 1
        self.times = Times()
        self.prompt: Prompt | None = None
        self.sequences: list[Sequence] = []

    def __enter__(self) -> Call:
        self.state.metrics.requests.add()
        return self

    def admit(self, permits: int = 1) -> None:
        """Take the permits, or raise: draining and overload come before any look at the request itself."""
        self.asked = permits
        self.state.refuse_if_down()
        if not self.state.permits.try_acquire(permits):
            raise Overloaded
        self.held = permits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state.permits.release(self.held)
        self._account(error)

    def queue(self, prompt: Prompt, count: int = 1, keep: bool = True) -> list[Sequence]:
        """Accept the prompt: `count` sequences of it, ready to run."""
        self.prompt = prompt
        self.times.queued = perf_counter()
        self.sequences = [Sequence(self, prompt, sampling, keep) for sampling in prompt.seeds(count)]
        metrics = self.state.metrics
        metrics.input_length.observe(prompt.length)
        metrics.max_new_tokens.observe(prompt.asked_new_tokens)
        return self.sequences

    async def run(self, prompt: Prompt, count: int = 1) -> list[Generation]:
        """All sequences to their end; when one fails, the others are cancelled."""
        sequences = self.queue(prompt, count)
        if count == 1:
            generations = [await sequences[0].run()]
        else:
            generations = await all_or_none([one.run() for one in sequences])
        self.times.end = perf_counter()
        return generations

    @property
    def generated(self) -> int:
        return sum(one.generation.count for one in self.sequences)

    def _account(self, error: BaseException | None) -> None:
        """Metrics and the one log line of this call."""
        self.times.end = self.times.ended()
        if self.prompt is None:
            self.state.metrics.ledger.reject(self.asked)
        cause = None if error is None or isinstance(error, GeneratorExit) else _cause(error)
        if cause is None:
            self._count_success()
        else:
            self.state.metrics.failures.add(1, (cause,))
        self._log(error, cause)

    def _count_success(self) -> None:
        metrics, times = self.state.metrics, self.times
        metrics.successes.add()
        per_token = times.inference / max(self.generated, 1)
        values = (times.total, times.validation, times.queue, times.inference, per_token)
        for histogram, value in zip(metrics.seconds.values(), values, strict=True):
            histogram.observe(value)
        metrics.generated_tokens.observe(self.generated)

    def _log(self, error: BaseException | None, cause: str | None) -> None:
        status = 200 if cause is None else error.status if isinstance(error, TextmillError) else 499
        first = self.sequences[0].generation if self.sequences else None
        event(
            logger,
            logging.INFO if cause is None or status < 500 else logging.WARNING,
            "request",
            route=self.route,
            status=status,
            error=cause or "",
            finish="" if first is None else first.finish or "",
            prompt_tokens=0 if self.prompt is None else self.prompt.length,
            generated_tokens=self.generated,
            seed=None if first is None else first.seed,
            total_ms=round(self.times.total * 1e3, 1),
            validation_ms=round(self.times.validation * 1e3, 1),
            queue_ms=round(self.times.queue * 1e3, 1),
            inference_ms=round(self.times.inference * 1e3, 1),
        )


def _cause(error: BaseException) -> str:
    """TGI's label for why a request failed; `dropped` when the client went away."""
    return next((name for kind, name in CAUSES if isinstance(error, kind)), "generation")


async def all_or_none(work: list[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """Results of all, in order; if one raises, the others are cancelled and waited for first."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
