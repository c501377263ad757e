"""The index finds the latest earlier place of the newest tokens, and nothing else, however the list grows."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from textmill.speculate.ngram import NOWHERE, NgramIndex


def behind_latest(tokens: list[int], length: int) -> int:
    """The same by looking everywhere."""
    for place in range(len(tokens) - 1, length - 1, -1):
        if tokens[place - length : place] == tokens[-length:]:
            return place
    return NOWHERE


def by_looking_everywhere(tokens: list[int]) -> int:
    triple = behind_latest(tokens, 3) if len(tokens) > 3 else NOWHERE
    pair = behind_latest(tokens, 2) if len(tokens) > 2 else NOWHERE
    return pair if triple == NOWHERE else triple


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=9))
def test_finds_what_a_search_finds(pieces: list[list[int]]) -> None:
    tokens: list[int] = []
    index = NgramIndex(tokens)
    for piece in pieces:
        tokens += piece
        index.extend()
        assert index.find() == by_looking_everywhere(tokens)


def test_reads_what_followed() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    index = NgramIndex(tokens)
    index.extend()
    assert index.find() == 3
    assert index.read(3, 3) == (4, 5, 6)
    assert index.read(3, 0) == ()


def test_a_loop_goes_on() -> None:
    index = NgramIndex([9, 7, 8, 7, 8])
    index.extend()
    assert index.find() == 3
    assert index.read(3, 5) == (7, 8, 7, 8, 7)


def test_a_triple_says_more_than_a_later_pair() -> None:
    index = NgramIndex([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3])
    index.extend()
    assert index.find() == 3
