"""The engine: one thread that plans, runs and digests steps, one ahead; requests come in and tokens go out safely.

Whatever a request or a step does, the thread goes on; only a dead runner or a bug of its own ends it, and then every
live request fails with the reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from textmill.core import Emission, Finish, Request, Step
from textmill.engine.admission import longest_total, refusal
from textmill.engine.runner import Runner
from textmill.engine.scheduler import EngineSettings, Event, Scheduler
from textmill.engine.sequence import Sequence, Sink
from textmill.engine.stats import Counters, Health, Ledger
from textmill.engine.suited import suited

log = logging.getLogger(__name__)

FRAME_NS = 16_000_000  # tokens that a screen shows in one frame leave together: every message costs


class RunnerDied(Exception):
    """The runner says that no later step can succeed."""


class Engine:
    """Serves requests with a runner it owns (and closes). `submit`, `cancel` and all questions are thread-safe."""

    def __init__(self, runner: Runner, settings: EngineSettings | None = None) -> None:
        settings = suited(settings or EngineSettings(), runner.limits)
        self.limits = runner.limits
        self.max_total_tokens = longest_total(runner.limits, settings.max_total_tokens)
        self.failure = ""  # why the engine ended by itself
        self.on_failure: Callable[[str], None] = lambda text: None
        self._runner = runner
        self._counters = Counters()
        self._scheduler = Scheduler(runner.limits, settings, self._counters)
        self._steps_ahead = settings.steps_ahead
        self._rest_seconds = settings.rest_seconds
        self._in_flight: deque[Step] = deque()
        self._outgoing: dict[Sink, list[Emission]] = {}  # what the last steps brought
        self._urgent = False  # whether an end or a first token is among it
        self._handed_ns = 0
        self._step_ns = 0  # what the last step took
        self._wake = threading.Condition()  # guards everything below
        self._ledger = Ledger()
        self._live: dict[int, Sequence] = {}
        self._arrived: list[Sequence] = []
        self._cancels: list[int] = []
        self._tickets = 0
        self._draining = False
        self._stopping = False
        self._progress_ns = time.monotonic_ns()
        self._thread = threading.Thread(target=self._run, name="textmill-engine", daemon=True)

    # For anybody, from any thread

    def start(self) -> None:
        """Start the thread; once is enough, more does no harm."""
        if self._thread.ident is None:
            self._thread.start()

    def submit(self, request: Request, sink: Sink) -> int:
        """Accept a request; its emissions (under `request.id`) go to `sink`. Returns the ticket that cancels it.

        A request that cannot be served fails through the sink, at once and on the caller's thread.
        """
        sequence = Sequence(
            request=request,
            number=0,
            limit=min(self.max_total_tokens, len(request.tokens) + request.max_new_tokens),
            owner=sink,
            submitted_ns=time.monotonic_ns(),
        )
        with self._wake:
            self._tickets += 1
            sequence.number = self._tickets
            self._ledger.accepted += 1
            reason = self._refusal(request)
            if reason:
                self._ledger.failed += 1
            else:
                self._accept(sequence)
        if reason:
            sink(self._counters.steps, [Emission(request.id, finish=Finish.FAILED, error=reason)])
        return sequence.number

    def cancel(self, ticket: int) -> None:
        """End a request; its sink hears `Finish.CANCELLED` unless it ended first. Unknown tickets are ignored."""
        with self._wake:
            if ticket in self._live:
                self._cancels.append(ticket)
                self._wake.notify_all()

    def drain(self) -> None:
        """From now on every new request fails with "draining"; what is live goes on."""
        with self._wake:
            self._draining = True

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing is live and all is handed over; False if that took longer than `timeout` seconds."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._live and not self._outgoing, timeout)

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread after the step in flight, fail what is live, close the runner."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            log.error("the runner did not come back within %.1f s; left behind", timeout)
            return
        self._fail_everything("the engine was stopped")
        self._runner.close()

    def ledger(self) -> Ledger:
        """A copy, consistent in itself."""
        with self._wake:
            ledger = self._ledger
            return Ledger(ledger.accepted, ledger.completed, ledger.failed, ledger.cancelled, len(self._live))

    def health(self) -> Health:
        with self._wake:
            age = time.monotonic_ns() - max(self._progress_ns, self._runner.progress_ns)
            return Health(self._counters.steps, age, bool(self._live), self._draining)

    def stats(self) -> dict[str, float]:
        """All numbers, under the names of `engine/stats.py`."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        running = tuple(scheduler.running)
        with self._wake:
            queue_size = len(scheduler.waiting) + len(self._arrived)
        values = self._counters.values() | self.ledger().values()
        values.update(
            queue_size=queue_size,
            running=len(running),
            batch_current_size=values["batch_current_size"] if running else 0.0,
            batch_current_max_tokens=sum(sequence.limit for sequence in running),
            batch_max_total_tokens=pool.total * self.limits.block_size,
            kv_blocks_total=pool.total,
            kv_blocks_used=pool.used,
            kv_blocks_cached=pool.evictable,
            prefix_entries=len(scheduler.prefix),
        )
        return {name: float(value) for name, value in values.items()}

    def check(self) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself; only while the engine rests."""
        self._scheduler.check()

    # Under the lock

    def _refusal(self, request: Request) -> str:
        if self._stopping or self.failure:
            return self.failure or "the engine was stopped"
        if self._draining:
            return "draining"
        return refusal(request, self.max_total_tokens, self.limits.vocab_size, self.limits.encodes, self.limits.sees)

    def _accept(self, sequence: Sequence) -> None:
        if not self._live:
            self._progress_ns = time.monotonic_ns()
        self._live[sequence.number] = sequence
        self._arrived.append(sequence)
        self._wake.notify_all()

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._take_arrivals():
                self._turn()
            while self._in_flight:
                self._digest_oldest()
            self._hand_over()
        except Exception as error:  # fault boundary: the thread's last word must reach every live request
            log.exception("the engine failed")
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
            self._fail_everything(self.failure)
            self.on_failure(self.failure)

    def _turn(self) -> None:
        """Schedule, run, update: the step just launched runs while the one before it is digested.

        What a step brought is handed over after the next one is launched, if that takes no time: whoever gets it wakes
        up and wants the interpreter, too.
        """
        if self._handed_over_first_tokens():
            return
        step = self._plan()
        if step is not None and (step.admissions or step.releases):
            self._hand_over()
        launched = step is not None and self._launch(step)
        if step is None or not launched or not self._can_wait(step):
            self._hand_over()
        if self._in_flight and (not launched or len(self._in_flight) > self._steps_ahead):
            self._digest_oldest()

    def _take_arrivals(self) -> bool:
        """Sleep until there is something to do, let in what came; False if the engine shall stop."""
        if not self._scheduler.busy:
            self._hand_over()
        with self._wake:
            while not (self._arrived or self._cancels or self._stopping or self._in_flight or self._scheduler.busy):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            cancels, self._cancels = self._cancels, []
            stopping = self._stopping
        for sequence in arrived:
            self._scheduler.add(sequence)
        leaving = [self._live[ticket] for ticket in dict.fromkeys(cancels) if ticket in self._live]
        self._deliver([self._scheduler.cancel(sequence) for sequence in leaving])
        return not stopping

    def _plan(self) -> Step | None:
        begin = time.thread_time()
        step = self._scheduler.schedule()
        self._counters.schedule_seconds += time.thread_time() - begin
        if step is None and not self._in_flight and self._scheduler.busy:
            raise RuntimeError("requests are waiting, but nothing can be planned")  # a bug; better loud than spinning
        return step

    def _launch(self, step: Step) -> bool:
        try:
            self._runner.submit(step)
        except Exception as error:  # noqa: BLE001 - fault boundary: a step that cannot start fails its own requests only
            self._lose(step, error)
            return False
        self._in_flight.append(step)
        return True

    def _digest_oldest(self) -> None:
        step = self._in_flight.popleft()
        try:
            result = self._runner.collect()
        except Exception as error:  # noqa: BLE001 - fault boundary: a step that breaks fails its own requests only
            self._lose(step, error)
            return
        self._step_ns = int(result.seconds * 1e9)
        begin, ran = time.perf_counter(), time.thread_time()
        prefill = self._scheduler.is_prefill(step)
        self._urgent |= prefill
        self._deliver(self._scheduler.update(step, result))
        self._counters.step_digested(time.perf_counter() - begin, prefill)
        self._counters.update_seconds += time.thread_time() - ran

    def _lose(self, step: Step, error: Exception) -> None:
        log.error("step %d failed", step.number, exc_info=error)
        text = f"a step of the engine failed: {type(error).__name__}: {error}"
        self._deliver(self._scheduler.fail(step, text))
        if not self._runner.alive:
            raise RunnerDied(str(error))

    def _deliver(self, events: list[Event]) -> None:
        """Balance the ledger; the emissions of a router leave in one piece with the next `_hand_over`."""
        with self._wake:
            self._progress_ns = time.monotonic_ns()
            for sequence, emission in events:
                self._outgoing.setdefault(sequence.owner, []).append(emission)
                if emission.finish:
                    self._urgent = True
                    self._close(sequence, emission.finish)

    def _can_wait(self, step: Step) -> bool:
        """Whether what is ready may leave with what `step` brings: ends and first tokens never do."""
        later = time.monotonic_ns() + self._step_ns
        return later - self._handed_ns < FRAME_NS and not self._urgent and not self._scheduler.is_prefill(step)

    def _handed_over_first_tokens(self) -> bool:
        """If kernels and everybody else share the cores, first tokens get a moment to travel before the next step.

        Only those that no running stream would wait for; then that step is planned with what has arrived meanwhile.
        """
        if not self._rest_seconds or not self._in_flight:
            return False
        if not self._scheduler.brings_first_tokens_only(self._in_flight[-1]):
            return False
        while self._in_flight:
            self._digest_oldest()
        self._hand_over()
        if self._scheduler.busy:
            time.sleep(self._rest_seconds)
        return True

    def _hand_over(self) -> None:
        if not self._outgoing:
            return
        self._handed_ns, self._urgent = time.monotonic_ns(), False
        for sink, emissions in self._outgoing.items():
            self._give(sink, emissions)
        with self._wake:
            self._outgoing = {}
            if not self._live:
                self._wake.notify_all()

    def _give(self, sink: Sink, emissions: list[Emission]) -> None:
        try:
            sink(self._counters.steps, emissions)
        except Exception:  # fault boundary: a sink that broke takes only its own requests along
            log.exception("a sink failed; its requests are cancelled")
            with self._wake:
                self._cancels += [number for number, sequence in self._live.items() if sequence.owner == sink]

    def _close(self, sequence: Sequence, finish: Finish) -> None:
        del self._live[sequence.number]
        if finish is Finish.CANCELLED:
            self._ledger.cancelled += 1
        elif finish is Finish.FAILED:
            self._ledger.failed += 1
        else:
            self._ledger.completed += 1

    def _fail_everything(self, text: str) -> None:
        """The scheduler is not asked any more; every live request ends."""
        with self._wake:
            live = list(self._live.values())
        self._deliver([(s, Emission(s.request.id, finish=Finish.FAILED, error=text)) for s in live])
        self._hand_over()
