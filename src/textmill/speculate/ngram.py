"""Finds where a sequence's newest tokens stood before: prompts are quoted, lists go on, code repeats itself.

A look-up and an append cost O(1), whatever the length. Source: "prompt lookup decoding" (A. Saxena, 2023).
"""

from __future__ import annotations

NOWHERE = -1


class NgramIndex:
    """For every pair and triple of neighbouring tokens, the place right behind its latest occurrence.

    It reads a growing list that belongs to somebody else; `extend` takes in what was appended.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._behind_pair: dict[tuple[int, int], int] = {}
        self._behind_triple: dict[tuple[int, int, int], int] = {}
        self._seen = 2

    def extend(self) -> None:
        """Take in the tokens appended since. The newest ones get their entry when something stands behind them."""
        tokens, pairs, triples = self._tokens, self._behind_pair, self._behind_triple
        for place in range(self._seen, len(tokens)):
            before, last = tokens[place - 2], tokens[place - 1]
            pairs[before, last] = place
            if place > 2:
                triples[tokens[place - 3], before, last] = place
        self._seen = max(self._seen, len(tokens))

    def find(self) -> int:
        """The place behind the latest earlier occurrence of the last three tokens, else of the last two."""
        tokens = self._tokens
        if len(tokens) > 2:
            place = self._behind_triple.get((tokens[-3], tokens[-2], tokens[-1]))
            if place is not None:
                return place
        return self._behind_pair.get((tokens[-2], tokens[-1]), NOWHERE) if len(tokens) > 1 else NOWHERE

    def read(self, place: int, count: int) -> tuple[int, ...]:
        """`count` tokens from `place` on; where the known ones end, the guess goes on with itself (a loop)."""
        tokens = self._tokens
        found = tokens[place : place + count]
        period = len(tokens) - place
        while len(found) < count:
            found.append(found[len(found) - period])
        return tuple(found)
