"""Guesses in the plan: which decode rows get a draft of the tokens to come, from what the rest of the step leaves.

Tokens, budget and blocks of everybody else come first; nobody is preempted for a guess.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from textmill.core import Sampled
from textmill.engine.blocks import BlockPool
from textmill.engine.plan import Plan, Row
from textmill.engine.sequence import Sequence
from textmill.engine.stats import Counters
from textmill.speculate.policy import Guesser


class Drafts:
    """Adds drafts to plans and learns from what comes back. `longest` is the most tokens of one draft; 0: off."""

    def __init__(self, longest: int, pool: BlockPool, block_size: int, budget: int, counters: Counters) -> None:
        self._longest = longest
        self._pool = pool
        self._block_size = block_size
        self._budget = budget
        self._counters = counters

    def wanted(self, running: Iterable[Sequence]) -> bool:
        """True if a sequence has guesses worth verifying: its newest token must be known before a step is planned."""
        return self._longest > 0 and any(one.guesser is not None and one.guesser.active for one in running)

    def add(self, plan: Plan, running: list[Sequence]) -> None:
        """Lengthen the rows of the sequences that guess, in order of arrival; all else is planned already."""
        if not self.wanted(running):
            return
        for row in plan.rows:
            sequence, work = row.sequence, row.work
            if sequence.guesser is None or not sequence.guesser.active or work.start + 1 != len(sequence.tokens):
                continue
            room = min(
                self._budget - plan.tokens,
                sequence.limit - sequence.planned_length,
                self._stored(sequence, len(running)) - len(sequence.tokens),
            )
            draft = sequence.guesser.draft(plan.decode_tokens, room)
            draft = cut(draft, sequence.request.stop_tokens)
            if draft:
                row.work = replace(work, count=1 + len(draft), draft=draft)
                self._take_blocks(plan, sequence, work.start + row.work.count)
                plan.tokens += len(draft)
                plan.decode_tokens += len(draft)

    def judge(self, row: Row, sampled: Sampled, running: int) -> None:
        """Tell the sequence what became of its draft, before `learn` hears of the tokens."""
        guessed, right = len(row.work.draft), len(sampled.more)
        if guessed and row.sequence.guesser is not None:
            self._counters.speculated_tokens_accepted += right
            self._counters.speculated_tokens_rejected += guessed - right
            row.sequence.guesser.judge(running, guessed, right)

    def learn(self, sequence: Sequence, running: int) -> None:
        """One token was appended. The first one finds the prompt not indexed yet, so that it is not delayed."""
        if sequence.guesser is not None:
            sequence.guesser.take(running)
        elif self._longest and sequence.started:
            sequence.guesser = Guesser(sequence.tokens, self._longest)

    def _stored(self, sequence: Sequence, running: int) -> int:
        """Tokens that fit into its blocks and into free ones that no running sequence will need in the next step."""
        return (len(sequence.blocks) + max(0, self._pool.available - running)) * self._block_size

    def _take_blocks(self, plan: Plan, sequence: Sequence, end: int) -> None:
        first = len(sequence.blocks)
        missing = -(-end // self._block_size) - first
        if missing > 0:
            sequence.blocks += self._pool.take(missing)
            plan.blocks.append((sequence.slot, first, tuple(sequence.blocks[first:])))


def cut(draft: tuple[int, ...], stops: tuple[int, ...]) -> tuple[int, ...]:
    """The draft up to a token that would end the sequence: nothing behind it is wanted."""
    return next((draft[:place] for place, token in enumerate(draft) if token in stops), draft)
