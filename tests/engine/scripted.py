"""A runner without a model that catches every wrong block, slot, position or order.

Its "model" is a pure function of all tokens before: what a request must get is known without an engine. It mostly
goes round in circles, so that guesses are often right. Keys and
values are digests of the whole prefix, written into numbered blocks and read back for every row, so that a stale,
shared or missing block shows at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from textmill.core import Admission, Request, RunnerLimits, Sampled, SlotWork, Step, StepResult, TokenChoice

SEED = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def limits(
    *,
    block_size: int = 4,
    num_blocks: int = 64,
    max_slots: int = 8,
    max_step_tokens: int = 64,
    max_total_tokens: int = 256,
    vocab_size: int = 50,
    reach: int = 0,
) -> RunnerLimits:
    return RunnerLimits(block_size, num_blocks, max_slots, max_step_tokens, max_total_tokens, vocab_size, reach)


def extend(digest: int, token: int) -> int:
    return ((digest ^ (token + 1)) * 0xD6E8FEB86659FD93 + (digest >> 29)) & MASK


def digest_of(tokens: Sequence[int]) -> int:
    digest = SEED
    for token in tokens:
        digest = extend(digest, token)
    return digest


def choose(tokens: Sequence[int], digest: int, vocab_size: int) -> TokenChoice:
    """What follows `tokens`: in seven of eight cases what followed four tokens ago."""
    again = len(tokens) > 3 and (digest >> 40) % 8
    return TokenChoice(tokens[-4] if again else (digest >> 17) % vocab_size, -float(digest % 997) / 100)


def expected(request: Request, vocab_size: int, max_total_tokens: int) -> list[int]:
    """The tokens that the request gets when it is served alone."""
    return [choice.id for choice in expected_choices(request, vocab_size, max_total_tokens)]


def expected_choices(request: Request, vocab_size: int, max_total_tokens: int) -> list[TokenChoice]:
    """The same, with the log-probabilities."""
    tokens = list(request.tokens)
    choices: list[TokenChoice] = []
    limit = min(max_total_tokens, len(tokens) + request.max_new_tokens)
    digest = digest_of(tokens)
    while len(tokens) < limit:
        choices.append(choose(tokens, digest, vocab_size))
        tokens.append(choices[-1].id)
        digest = extend(digest, tokens[-1])
        if tokens[-1] in request.stop_tokens:
            break
    return choices


class WrongStep(Exception):
    """The engine asked for something that a real runner would compute wrongly."""


@dataclass
class Slot:
    admission: Admission
    tokens: list[int]
    digests: list[int]
    blocks: list[int] = field(default_factory=list)
    lost: bool = False  # it had a row in a step that raised
    moved: int = 0  # tokens that its state has moved on by, if it has one

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.digests.append(extend(self.digests[-1], token))


class ScriptedRunner:
    """Runs a step when it is collected (`eager`: when it is submitted, in a lossless real one's place).

    `script` may look at each step and raise, wait, or return the numbers of rows that fail.
    """

    def __init__(
        self, its_limits: RunnerLimits | None = None, seconds: float = 0.0, eager: bool = False, verify: bool = True
    ) -> None:
        self.limits = its_limits or limits()
        self.alive = True
        self.progress_ns = 0
        self.closed = False
        self.seconds = seconds
        self.script: Callable[[Step], set[int] | None] = lambda step: None
        self.clock: Callable[[Step], float] = lambda step: self.seconds  # what it says a step took
        self.steps: list[Step] = []
        self._eager = eager
        self._verify = verify
        self._slots: dict[int, Slot] = {}
        self._stored: dict[tuple[int, int], int] = {}
        self._queue: deque[Step] = deque()
        self._results: deque[StepResult | Exception] = deque()
        self._last = 0

    def submit(self, step: Step) -> None:
        self.steps.append(step)
        self._queue.append(step)
        if self._eager:
            self._run_next()

    def collect(self) -> StepResult:
        if not self._results:
            self._run_next()
        result = self._results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self.closed = True

    def _run_next(self) -> None:
        step = self._queue.popleft()
        try:
            self._results.append(self._run(step))
        except Exception as error:  # noqa: BLE001 - carried to collect
            self._results.append(error)
            for work in step.work:
                self._slots[work.slot].lost = True

    def _run(self, step: Step) -> StepResult:
        if step.number <= self._last:
            raise WrongStep(f"step {step.number} after {self._last}")
        self._last = step.number
        self._keep_books(step)
        time.sleep(self.seconds)
        broken = self.script(step) or set()
        rows = [self._row(work) for work in step.work]
        if len({work.slot for work in step.work}) != len(rows):
            raise WrongStep("a slot works twice in one step")
        if sum(work.count for work in step.work) > self.limits.max_step_tokens:
            raise WrongStep("too many tokens in one step")
        rows = [
            replace(row, token=None, more=(), error="not a number") if i in broken else row
            for i, row in enumerate(rows)
        ]
        return StepResult(step.number, tuple(rows), self.clock(step))

    def _keep_books(self, step: Step) -> None:
        for slot in step.releases:
            self._slots.pop(slot, None)
        for admission in step.admissions:
            if not 0 <= admission.slot < self.limits.max_slots:
                raise WrongStep(f"slot {admission.slot}")
            occupant = self._slots.get(admission.slot)
            if occupant is not None and not occupant.lost:
                raise WrongStep(f"slot {admission.slot} was not released")
            digests = [SEED]
            for token in admission.tokens:
                digests.append(extend(digests[-1], token))
            self._slots[admission.slot] = Slot(admission, list(admission.tokens), digests)
        for number, first, blocks in step.blocks:
            table = self._slots[number].blocks
            if first != len(table) or not all(0 <= block < self.limits.num_blocks for block in blocks):
                raise WrongStep(f"blocks {blocks} at {first} of {len(table)}")
            table += blocks

    def _row(self, work: SlotWork) -> Sampled:
        slot, end = self._slots[work.slot], work.start + work.count
        if slot.lost:
            return Sampled(work.slot, None, error="lost in an earlier step")
        known = end - len(work.draft)
        if known <= work.start or known > len(slot.tokens) or work.samples != (known == len(slot.tokens)):
            raise WrongStep(f"{work} with {len(slot.tokens)} tokens")
        if work.draft and not work.samples:
            raise WrongStep(f"{work} has guesses but does not sample")
        if end > min(len(slot.blocks) * self.limits.block_size, self.limits.max_total_tokens):
            raise WrongStep(f"{work} with {len(slot.blocks)} blocks")
        if self.limits.forward_only:
            if work.start != slot.moved or work.draft:
                raise WrongStep(f"{work} with a state after {slot.moved} tokens")
            slot.moved = end
        logprobs = self._prompt_logprobs(slot, work)
        for token in work.draft:
            slot.append(token)
        if self._verify:
            self._read_and_write(slot, work.start, end)
        if not work.samples:
            return Sampled(work.slot, None, logprobs)
        first, *more = self._accept(slot, known, work.draft)
        return Sampled(work.slot, first, logprobs, more=tuple(more))

    def _accept(self, slot: Slot, known: int, draft: tuple[int, ...]) -> list[TokenChoice]:
        """Chooses after every right guess; the first wrong one is forgotten with all behind it."""
        chosen: list[TokenChoice] = []
        for place in range(known, known + len(draft) + 1):
            chosen.append(choose(slot.tokens[:place], slot.digests[place], self.limits.vocab_size))
            if place == known + len(draft) or chosen[-1].id != draft[place - known]:
                break
        del slot.tokens[known:], slot.digests[known + 1 :]
        for choice in chosen:
            slot.append(choice.id)
        return chosen

    def _read_and_write(self, slot: Slot, start: int, end: int) -> None:
        size, reach = self.limits.block_size, self.limits.reach
        for position in range(max(0, start - reach + 1) if reach else 0, end):
            place = (slot.blocks[position // size], position % size)
            if position >= start:
                self._stored[place] = slot.digests[position + 1]
            elif self._stored.get(place) != slot.digests[position + 1]:
                raise WrongStep(f"position {position} of slot {slot.admission.slot} reads {place}: not its own")

    def _prompt_logprobs(self, slot: Slot, work: SlotWork) -> tuple[float, ...]:
        if not slot.admission.prompt_logprobs:
            return ()
        prompt = len(slot.admission.tokens)
        positions = range(work.start + 1, min(work.start + work.count + 1, prompt))
        return tuple(-float(slot.tokens[position]) for position in positions)
