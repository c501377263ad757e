"""Sequences guess where it pays and rest where it does not; a guess is always what the tokens themselves suggest."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from textmill.speculate.policy import FIRST_STREAK, LONGEST_STREAK, Guesser, price

LONGEST = 6


@dataclass
class Account:
    steps: int = 0
    planned_late: int = 0
    guessed: int = 0
    right: int = 0


def generate(prompt: list[int], output: list[int], rows: int = 1, longest: int = LONGEST) -> Account:
    """Plays an engine that is certain to sample `output` after the prompt."""
    known, account = list(prompt), Account()
    guesser = Guesser(known, longest)
    while len(known) < len(prompt) + len(output):
        ahead = output[len(known) - len(prompt) :]
        draft = guesser.draft(rows, len(ahead) - 1) if guesser.active else ()
        right = next((i for i, token in enumerate(draft) if token != ahead[i]), len(draft))
        account.steps += 1
        account.planned_late += guesser.active
        account.guessed += len(draft)
        account.right += right
        if draft:
            guesser.judge(rows, len(draft), right)
        for token in ahead[: right + 1]:
            known.append(token)
            guesser.take(rows)
    return account


def words(count: int, seed: int, vocabulary: int = 5000) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=count)


def test_a_row_costs_more_in_a_larger_batch() -> None:
    prices = [price(rows) for rows in (1, 2, 8, 32, 128)]
    assert prices == sorted(prices)
    assert 0 < prices[0] < prices[-1] < 1


def test_a_quotation_is_guessed() -> None:
    passage = words(120, seed=1)
    account = generate([*words(30, seed=2), *passage, *words(10, seed=3)], [*passage, *words(2, seed=4)])
    assert account.steps < 40
    assert account.right > 0.9 * account.guessed


def test_a_quotation_with_changes_is_guessed_again_after_each() -> None:
    passage = words(200, seed=5)
    changed = [token if place % 20 else -1 for place, token in enumerate(passage)]
    account = generate(passage, changed)
    assert account.right > 0.4 * len(changed)


def test_where_nothing_repeats_nothing_is_tried() -> None:
    account = generate(words(200, seed=6), words(300, seed=7))
    assert account.guessed == 0
    assert account.planned_late == 0


@pytest.mark.parametrize("seed", range(5))
def test_where_little_repeats_little_is_lost(seed: int) -> None:
    """Frequent pairs of few words: predictions abound and are mostly wrong."""
    account = generate(words(300, seed, vocabulary=8), words(400, seed + 100, vocabulary=8))
    lost = account.guessed * price(1) - account.right
    assert lost < 0.02 * 400
    assert account.planned_late < 0.1 * 400


def test_rows_of_a_large_batch_are_guessed_with_more_care() -> None:
    passage = words(150, seed=8)
    account = generate(passage, passage, rows=32)
    assert 0 < account.guessed < generate(passage, passage).guessed


def test_attempts_that_do_not_pay_become_rare() -> None:
    guesser = Guesser([1, 2, 3], LONGEST)
    needed = [guesser._needed]
    for _ in range(10):
        guesser.active, guesser._balance = True, -1.0
        guesser._rest()
        needed.append(guesser._needed)
    assert needed[:3] == [FIRST_STREAK, 2 * FIRST_STREAK, 4 * FIRST_STREAK]
    assert needed[-1] == LONGEST_STREAK
    guesser.active, guesser._balance = True, 1.0
    guesser._rest()
    assert guesser._needed == FIRST_STREAK


def test_a_draft_has_no_more_than_was_asked_for() -> None:
    passage = words(60, seed=9)
    known = [*passage, *passage[:20]]
    guesser = Guesser(known, LONGEST)
    for token in passage[20:40]:
        known.append(token)
        guesser.take(1)
    assert guesser.active
    assert guesser.draft(1, 100) == tuple(passage[40 : 40 + LONGEST])
    assert guesser.draft(1, 2) == tuple(passage[40:42])
    assert guesser.draft(1, 0) == ()
