"""When a sequence guesses, and how many tokens: only as long as the guesses pay.

A guess costs a row of the step, and all sequences the head start of planning a step before the last one is read. So
a sequence first guesses in the shadow: what follows is compared with what the index predicts, which costs next to
nothing. After a few right predictions in a row it becomes active, and its guesses are verified by the model.
"""

from __future__ import annotations

from textmill.speculate.ngram import NOWHERE, NgramIndex

FIRST_STREAK = 1  # right predictions in a row that make a sequence active; doubled by every attempt that did not pay
LONGEST_STREAK = 64
WEIGHT = 0.25  # of the newest prediction in the average of how often they are right
PASS_ROWS = 4.0  # reading all weights once takes as long as the arithmetic of so many rows (2 cores, AVX2)
HEAD_START = 0.05  # tokens that a stream loses by every step that is not planned ahead
PATIENCE = 2  # steps that an active sequence goes without having a guess


def price(rows: int) -> float:
    """What one more row costs in a step of so many rows, in tokens: a step of n rows brings n tokens."""
    return rows / (rows + PASS_ROWS)


class Guesser:
    """The guesses of one sequence. It reads the sequence's own list of tokens, which must only grow."""

    def __init__(self, tokens: list[int], longest: int) -> None:
        self.active = False
        self._longest = longest
        self._tokens = tokens
        self._index = NgramIndex(tokens)
        self._index.extend()
        self._place = self._index.find()  # of the token that predicts the next one
        self._rate = 0.0  # of right predictions, an exponential average
        self._streak = 0
        self._needed = FIRST_STREAK
        self._waits = 0
        self._balance = 0.0  # tokens won by the current attempt

    def take(self, rows: int) -> None:
        """One token was appended; steps have so many rows at present."""
        cost = price(rows)
        self._compare()
        self._index.extend()
        if self._streak == 0:
            self._place = self._index.find()
        if not self.active:
            self.active = self._streak >= self._needed and self._rate > cost
            self._balance, self._waits = 0.0, 0
        elif self._rate < cost:
            self._rest()

    def draft(self, rows: int, room: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow: as many as are likely enough to be worth a row beside `rows`."""
        if self._place == NOWHERE:
            self._waits += 1
            if self._waits > PATIENCE:
                self._rest()
            return ()
        self._waits = 0
        count, chance = 0, self._rate
        while count < min(self._longest, room) and chance > price(rows + count):
            count += 1
            chance *= self._rate
        return self._index.read(self._place, count)

    def judge(self, rows: int, guessed: int, right: int) -> None:
        """What became of a draft, told before its tokens are taken."""
        self._balance += right - price(rows) * guessed - HEAD_START

    def _compare(self) -> None:
        if self._place == NOWHERE:
            self._streak = 0
        elif self._tokens[self._place] == self._tokens[-1]:
            self._place += 1
            self._streak += 1
            self._rate += WEIGHT * (1.0 - self._rate)
        else:
            self._streak = 0
            self._rate -= WEIGHT * self._rate

    def _rest(self) -> None:
        """Back to the shadow; an attempt that did not pay makes the next one harder to begin."""
        paid = self._balance > 0
        self._needed = FIRST_STREAK if paid else min(2 * self._needed, LONGEST_STREAK)
        self.active = False
