"""Plans each step and digests its result: every decoding sequence gets its token, prompts fill the rest.

One counter per sequence (`computed`) is all there is: prefill, chunks of it, decode, cache hits and resuming after
preemption are tokens not computed yet. Plans are made one step ahead, so a planned decode row may read a token that
nobody here knows yet, and a row may turn out void because its sequence ended in the step before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from textmill.core import (
    Admission,
    Emission,
    Finish,
    RunnerLimits,
    Sampled,
    SlotWork,
    Step,
    StepResult,
    TokenChoice,
)
from textmill.engine.blocks import BlockPool, IntegrityError
from textmill.engine.drafts import Drafts
from textmill.engine.pacing import Pacing
from textmill.engine.plan import Plan, Row
from textmill.engine.prefix import PrefixCache
from textmill.engine.sequence import Sequence, State
from textmill.engine.stats import Counters
from textmill.engine.waiting import WaitingLine
from textmill.engine.windows import Windows

Event = tuple[Sequence, Emission]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine uses its runner. None: as much as the runner can.

    `max_batch_prefill_tokens` bounds the tokens of one step, `prefill_tokens_beside_decode` those of prompts in a
    step that also decodes (None: no further bound); `prefill_pacing` adds a bound that is learned, so that running
    streams hardly feel a prompt arrive. `steps_ahead` is how many steps are launched while one runs: 1 keeps the runner
    busy, 0 plans each step with all that is known. `speculate`: the most tokens that a sequence guesses ahead; 0: none.
    `rest_seconds`: how long a runner that takes every core rests after a step that brought nothing but first tokens.
    """

    max_batch_prefill_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_size: int | None = None
    prefill_tokens_beside_decode: int | None = None
    prefill_pacing: bool = True
    prefix_caching: bool = True
    steps_ahead: int = 1
    speculate: int = 0
    rest_seconds: float = 0.0


class Scheduler:
    """Slots, blocks and turns. Not thread-safe: one thread calls everything."""

    def __init__(self, limits: RunnerLimits, settings: EngineSettings, counters: Counters) -> None:
        self.waiting = WaitingLine()
        self.running: list[Sequence] = []  # in order of arrival; all older than anyone waiting
        self.pool = BlockPool(limits.num_blocks)
        self.prefix = PrefixCache(self.pool, limits.block_size, enabled=settings.prefix_caching)
        self._windows = Windows(self.pool, self.prefix, limits.block_size, limits.reach)
        self._reach = limits.reach
        self._counters = counters
        self._block_size = limits.block_size
        self._budget = min(settings.max_batch_prefill_tokens or limits.max_step_tokens, limits.max_step_tokens)
        self._beside_decode = settings.prefill_tokens_beside_decode
        self._pacing = Pacing() if settings.prefill_pacing else None
        self._drafts = Drafts(settings.speculate, self.pool, self._block_size, self._budget, counters)
        # Never more sequences than a step has tokens: then each can have one in every step.
        self._slots = min(limits.max_slots, limits.max_step_tokens, settings.max_batch_size or limits.max_slots)
        self._free_slots = list(range(self._slots - 1, -1, -1))
        self._releases: list[int] = []
        self._plans: dict[int, Plan] = {}
        self._number = 0
        self._done_ns = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """A request that `admission.refusal` let through joins the line."""
        self.waiting.join(sequence)

    def cancel(self, sequence: Sequence) -> Event:
        return sequence, self._end(sequence, Emission(sequence.request.id, finish=Finish.CANCELLED))

    def schedule(self) -> Step | None:
        """Plan the next step; None if nothing can be computed before an earlier step comes back (or at all)."""
        if self._plans and self._drafts.wanted(self.running):
            return None  # guesses start from a token that is known
        if self._reach:
            self._windows.leave(self.running)
        plan = Plan(self._number + 1)
        self._plan_decodes(plan)
        self._plan_prefills(plan)
        self._drafts.add(plan, self.running)
        return self._launch(plan) if plan.rows else None

    def update(self, step: Step, result: StepResult) -> list[Event]:
        """Digest what a step brought; the rows of sequences that have ended meanwhile are void."""
        plan = self._plans[step.number]
        if len(result.sampled) != len(plan.rows):
            return self.fail(step, f"the runner answered {len(result.sampled)} of {len(plan.rows)} rows")
        del self._plans[step.number]
        now = time.monotonic_ns()
        # A step launched ahead of its turn began when the one before it was done.
        self._counters.step_done(result, (now - max(plan.launched_ns, self._done_ns)) * 1e-9, plan.prefill)
        self._done_ns = now
        if self._pacing is not None:
            self._pacing.observe(plan.decode_tokens, plan.tokens - plan.decode_tokens, result.seconds)
        events: list[Event] = []
        for row, sampled in zip(plan.rows, result.sampled, strict=True):
            emission = self._settle(row, sampled)
            if emission is not None:
                events.append((row.sequence, emission))
        return events

    def is_prefill(self, step: Step) -> bool:
        """True if a step in flight holds any prompt token."""
        return self._plans[step.number].prefill

    def brings_first_tokens_only(self, step: Step) -> bool:
        """True if a step in flight brings first tokens and no others."""
        plan = self._plans[step.number]
        return plan.prefill and not plan.decode_tokens and any(row.work.samples for row in plan.rows)

    def fail(self, step: Step, text: str) -> list[Event]:
        """A step was lost: its sequences fail, all others go on."""
        plan = self._plans.pop(step.number)
        self._counters.step_failed(plan.prefill)
        # The runner may not have got as far as the releases. Slots taken again meanwhile are replaced anyway.
        self._releases += [s for s in step.releases if s in self._free_slots and s not in self._releases]
        living = [row.sequence for row in plan.rows if row.sequence.state is not State.FINISHED]
        return [(sequence, self._fail(sequence, text)) for sequence in living]

    def check(self) -> None:
        """Raise IntegrityError if slots, blocks, order or counters contradict each other (tests call this)."""
        self.pool.check([sequence.held for sequence in self.running])
        slots = sorted([s.slot for s in self.running] + self._free_slots)
        numbers = [s.number for s in self.running] + [s.number for s in self.waiting]
        if slots != list(range(self._slots)):
            raise IntegrityError(f"slots {slots} of {self._slots}")
        if numbers != sorted(numbers):
            raise IntegrityError(f"not in order of arrival: {numbers}")
        for sequence in self.running:
            covered = len(sequence.blocks) * self._block_size
            if not sequence.settled <= sequence.computed <= min(sequence.planned_length, covered):
                raise IntegrityError(f"sequence {sequence.number} counts wrongly")
            if sequence.planned_length > sequence.limit:
                raise IntegrityError(f"sequence {sequence.number} is planned past its limit")
        for sequence in self.waiting:
            if sequence.blocks or sequence.slot >= 0:
                raise IntegrityError(f"sequence {sequence.number} waits with blocks or a slot")

    # Planning

    def _plan_decodes(self, plan: Plan) -> None:
        for sequence in tuple(self.running):
            if sequence.state is not State.RUNNING or sequence.planned_length >= sequence.limit:
                continue
            if sequence.planned_length - sequence.computed == 1 and self._make_room(plan, sequence):
                self._add_row(plan, sequence, 1)

    def _make_room(self, plan: Plan, sequence: Sequence) -> bool:
        """A block for one more token, if need be from the youngest; False if that is the sequence itself.

        Rows are planned in order of arrival, so a victim never has a row in this step.
        """
        while self._missing(sequence, sequence.computed + 1) > self.pool.available:
            victim = self.running[-1]
            self._preempt(plan, victim)
            if victim is sequence:
                return False
        return True

    def _plan_prefills(self, plan: Plan) -> None:
        plan.decode_tokens = plan.tokens
        budget = self._prompt_budget(plan)
        for sequence in tuple(self.running):
            if budget > 0 and sequence.last_step != plan.number and sequence.planned_length < sequence.limit:
                budget -= self._plan_chunk(plan, sequence, budget)
        while budget > 0 and self.waiting and self._free_slots and not plan.preempted:
            taken = self._admit(plan, self.waiting.head, budget)
            if not taken:
                break  # the head of the line is served first, or nobody
            budget -= taken

    def _prompt_budget(self, plan: Plan) -> int:
        """Prompt tokens that the step may compute beside the decodes planned already."""
        decoding = len(plan.rows)
        bounds = [self._budget - plan.decode_tokens]
        if decoding and self._beside_decode is not None:
            bounds.append(self._beside_decode)
        if self._pacing is not None and (len(self.running) > decoding or self.waiting):
            everybody = (*self.running, *self.waiting)
            newcomers = sum(not one.started and one.last_step != plan.number for one in everybody)
            paced = self._pacing.allowance(plan.decode_tokens, decoding, newcomers)
            bounds += () if paced is None else (paced,)
        return max(1, min(bounds))  # prompts get on even beside more decodes than the budget

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """The next chunk of a running sequence's prompt, as long as budget and blocks allow; tokens planned."""
        if sequence.state is not State.RUNNING:
            return 0  # preempted a moment ago
        while not (room := self._room(sequence)):
            victim = self.running[-1]
            if victim is sequence or victim.last_step == plan.number:
                return 0  # others get on, and give their blocks back some day
            self._preempt(plan, victim)
        count = min(sequence.planned_length - sequence.computed, budget, room)
        self._add_row(plan, sequence, count)
        return count

    def _admit(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """Give the head of the line a slot and its first chunk; tokens planned, 0 if it has to wait."""
        if sequence.in_flight:
            return 0  # preempted, and a token of it is still on its way
        skipped, hits = self._windows.look_up(sequence)
        start = (skipped + len(hits)) * self._block_size
        count = min(len(sequence.tokens) - start, budget)
        if not self._affordable(sequence, hits, start, start + count):
            return 0
        self.pool.share(hits)
        self._move_in(sequence, skipped, hits)
        plan.admissions.append(
            Admission(
                slot=sequence.slot,
                tokens=tuple(sequence.tokens),
                sampling=sequence.request.sampling,
                top_n_tokens=sequence.request.top_n_tokens,
                prompt_logprobs=sequence.wants_prompt_logprobs,
                encoder_tokens=sequence.request.encoder_tokens,
                images=sequence.request.images,
            )
        )
        self._add_row(plan, sequence, count, first_block=0)
        return count + len(sequence.request.encoder_tokens)  # which are read in this step, too

    def _affordable(self, sequence: Sequence, hits: list[int], start: int, end: int) -> bool:
        """Blocks for the first chunk, and one for each running sequence, which will soon ask for it.

        Who was preempted needs room for all its tokens, or it would be thrown out again half-way.
        """
        if self.running and sequence.residency:
            end = self._windows.needed(start, len(sequence.tokens) + 1, self._budget)
        needed = -(-end // self._block_size) - start // self._block_size
        return needed + len(self.running) <= self.pool.available - self.pool.unheld(hits)

    def _move_in(self, sequence: Sequence, skipped: int, hits: list[int]) -> None:
        self.waiting.leave(sequence)
        self.running.append(sequence)
        sequence.state = State.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.blocks = [0] * skipped + hits if skipped else hits
        sequence.left = skipped
        sequence.registered = skipped + len(hits)
        sequence.computed = sequence.settled = sequence.registered * self._block_size
        sequence.prompt_logprobs.clear()
        self._counters.prefix_hit_tokens += sequence.computed
        self._counters.batch_concat += len(self.running) > 1
        if not sequence.residency:
            sequence.queue_ns = time.monotonic_ns() - sequence.submitted_ns
            sequence.cached_tokens = sequence.computed
            self._counters.prompt_tokens += len(sequence.tokens)
        sequence.residency += 1

    def _add_row(self, plan: Plan, sequence: Sequence, count: int, first_block: int | None = None) -> None:
        start, slot = sequence.computed, sequence.slot
        missing = self._missing(sequence, start + count)
        first = len(sequence.blocks) if first_block is None else first_block
        if missing > 0:
            sequence.blocks += self.pool.take(missing)
        if len(sequence.blocks) > first:
            plan.blocks.append((slot, first, tuple(sequence.blocks[first:])))
        samples = start + count == sequence.planned_length
        plan.rows.append(Row(sequence, sequence.residency, SlotWork(slot, start, count, samples)))
        plan.tokens += count
        plan.prefill |= start < len(sequence.request.tokens)
        sequence.computed = start + count
        sequence.in_flight += samples
        sequence.last_step = plan.number

    def _launch(self, plan: Plan) -> Step:
        step = Step(
            number=plan.number,
            work=tuple([row.work for row in plan.rows]),
            admissions=tuple(plan.admissions),
            releases=tuple(self._releases),
            blocks=tuple(plan.blocks),
        )
        self._number = plan.number
        self._releases.clear()
        self._plans[plan.number] = plan
        plan.launched_ns = time.monotonic_ns()
        self._counters.step_planned(len(plan.rows), plan.tokens, plan.prefill)
        return step

    def _missing(self, sequence: Sequence, end: int) -> int:
        """Blocks that a sequence lacks to hold `end` tokens."""
        return -(-end // self._block_size) - len(sequence.blocks)

    def _room(self, sequence: Sequence) -> int:
        """Tokens that fit into a sequence's blocks and all free ones."""
        return (len(sequence.blocks) + self.pool.available) * self._block_size - sequence.computed

    # Digesting

    def _settle(self, row: Row, sampled: Sampled) -> Emission | None:
        sequence, work = row.sequence, row.work
        if sequence.state is State.FINISHED:
            self._counters.void_rows += 1
            return None
        if sampled.error or (work.samples and sampled.token is None):
            return self._fail(sequence, sampled.error or "the model chose no token")
        tokens, finish = self._take_tokens(row, sampled)
        if row.residency == sequence.residency:
            sequence.prompt_logprobs += sampled.prompt_logprobs
            if sequence.state is State.RUNNING:
                sequence.settled = work.start + work.count
                if work.draft:  # what was guessed wrongly is not computed
                    sequence.settled -= len(work.draft) + 1 - len(tokens)
                    sequence.computed = sequence.settled
                self.prefix.register(sequence)
        return self._emit(sequence, tokens, finish) if tokens else None

    def _take_tokens(self, row: Row, sampled: Sampled) -> tuple[tuple[TokenChoice, ...], Finish]:
        """Append what was sampled, as far as the first token that ends the sequence."""
        if not row.work.samples or sampled.token is None:
            return (), Finish.NONE
        sequence = row.sequence
        sequence.in_flight -= 1
        tokens, finish = (sampled.token, *sampled.more), sequence.append(sampled.token.id)
        self._drafts.judge(row, sampled, len(self.running))
        self._drafts.learn(sequence, len(self.running))
        for place, token in enumerate(sampled.more, 1):
            if finish:
                tokens = tokens[:place]
                break
            finish = sequence.append(token.id)
            self._drafts.learn(sequence, len(self.running))
        self._counters.generated_tokens += len(tokens)
        return tokens, finish

    def _emit(self, sequence: Sequence, tokens: tuple[TokenChoice, ...], finish: Finish) -> Emission:
        if sequence.started:
            emission = Emission(sequence.request.id, tokens, finish)
        else:
            emission = self._first_emission(sequence, tokens, finish)
        return self._end(sequence, emission) if finish else emission

    def _first_emission(self, sequence: Sequence, tokens: tuple[TokenChoice, ...], finish: Finish) -> Emission:
        asked = sequence.wants_prompt_logprobs
        sequence.started = True
        return Emission(
            request_id=sequence.request.id,
            tokens=tokens,
            finish=finish,
            prompt_logprobs=(float("nan"), *sequence.prompt_logprobs) if asked else None,
            queue_ns=sequence.queue_ns,
            cached_tokens=sequence.cached_tokens,
        )

    def _fail(self, sequence: Sequence, text: str) -> Emission:
        self.prefix.forget(sequence.held)
        return self._end(sequence, Emission(sequence.request.id, finish=Finish.FAILED, error=text))

    def _end(self, sequence: Sequence, emission: Emission) -> Emission:
        if sequence.state is State.RUNNING:
            self._move_out(sequence)
        else:
            self.waiting.leave(sequence)
        sequence.state = State.FINISHED
        return emission

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        """Out of its slot, back to the head of the line; what it computed may survive in the prefix cache."""
        self._counters.preemptions += 1
        plan.preempted = True
        self._move_out(sequence)
        sequence.state = State.WAITING
        self.waiting.return_to_head(sequence)

    def _move_out(self, sequence: Sequence) -> None:
        """Blocks and slot are free at once: the steps in flight run before any step that reuses them."""
        self.running.remove(sequence)
        self.pool.release(sequence.held)
        self._free_slots.append(sequence.slot)
        self._releases.append(sequence.slot)
        sequence.blocks = []
        sequence.left = 0
        sequence.slot = -1
        sequence.computed = sequence.settled = 0
