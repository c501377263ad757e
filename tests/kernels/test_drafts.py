"""A step that verifies guesses brings, bit for bit, what steps of one token bring, up to the first wrong guess."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.tiny import VOCABULARY, Tiny, put, work
from textmill.kernels.native import Program, StepArrays

PROMPT = 40
KNOBS = {
    "greedy": {},
    "seeded": {
        "draws": 1,
        "seed": 7,
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
    },
}
Choice = tuple[int, float, tuple[int, ...], tuple[float, ...]]


def prompt() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY, PROMPT).astype(np.int32)


def admit(p: Program, slot: int, knobs: str, top_n: int = 3) -> None:
    put(p, slot, prompt())
    p.top_n[slot] = top_n
    for name, value in KNOBS[knobs].items():
        getattr(p, name)[slot] = value


def choice(step: StepArrays, place: int) -> Choice:
    top = slice(0, step.top_count[place])
    values = (tuple(step.top_ids[place, top].tolist()), tuple(step.top_logprobs[place, top].tolist()))
    return int(step.token[place]), float(step.logprob[place]), *values


def one_by_one(p: Program, slot: int, count: int) -> list[Choice]:
    """The prompt, then single tokens."""
    found = [choice(p.run(work((slot, 0, PROMPT, 1))), 0)]
    while len(found) < count:
        found.append(choice(p.run(work((slot, int(p.length[slot]) - 1, 1, 1))), 0))
    return found


def guess(p: Program, slot: int, draft: list[int]) -> tuple[int, int, int, int]:
    """Work that verifies a draft."""
    length = int(p.length[slot])
    p.tokens[slot, length : length + len(draft)] = draft
    return (slot, length - 1, 1 + len(draft), 1 + len(draft))


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("right", [0, 1, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_guesses_bring_what_single_steps_bring(knobs: str, right: int, packed: bool) -> None:
    model = Tiny(packed=packed)
    alone = model.program(half=packed)
    admit(alone, 0, knobs)
    wanted = one_by_one(alone, 0, 20)
    p = model.program(half=packed)
    admit(p, 1, knobs)
    found = one_by_one(p, 1, 3)
    while len(found) < 20:
        tokens = [token for token, *_ in wanted[len(found) : len(found) + 6]]
        draft = [token if place < right else (token + 1) % VOCABULARY for place, token in enumerate(tokens)]
        step = p.run(work(guess(p, 1, draft)))
        accepted = min(right, len(draft)) + 1
        assert (step.token[:accepted] >= 0).all()
        assert (step.token[accepted:] == -1).all()
        found += [choice(step, place) for place in range(accepted)]
        assert p.length[1] == PROMPT + len(found)
    assert found[:20] == wanted
    assert list(p.tokens[1, PROMPT : PROMPT + 20]) == [token for token, *_ in wanted]


def test_guesses_among_others_in_one_step() -> None:
    """Slices of four output rows cut through the items; each gets what it gets alone."""
    model = Tiny()
    alone = model.program()
    admit(alone, 0, "greedy")
    admit(alone, 1, "seeded")
    greedy, seeded = one_by_one(alone, 0, 8), one_by_one(alone, 1, 8)
    p = model.program()
    admit(p, 0, "greedy")
    admit(p, 1, "seeded")
    admit(p, 2, "greedy")
    p.run(work((0, 0, PROMPT, 1), (1, 0, PROMPT, 1)))
    drafts = [token for token, *_ in greedy[1:7]], [token for token, *_ in seeded[1:4]]
    items = guess(p, 0, drafts[0]), (2, 0, 11, 0), guess(p, 1, [*drafts[1], 0, 0])
    step = p.run(work(*items))
    assert [choice(step, place) for place in range(7)] == greedy[1:]
    assert step.token[7] == -1
    right = int((step.token[8:] >= 0).sum())
    assert right >= 4
    assert [choice(step, 8 + place) for place in range(4)] == seeded[1:5]
    assert list(p.length[:3]) == [PROMPT + 8, PROMPT + 1 + right, PROMPT]


def test_guesses_behind_the_last_chunk_of_a_prompt() -> None:
    model = Tiny()
    alone = model.program()
    admit(alone, 0, "greedy")
    wanted = one_by_one(alone, 0, 4)
    p = model.program()
    admit(p, 0, "greedy")
    p.prompt_logprobs[0] = 1
    p.run(work((0, 0, 25, 0)))
    p.tokens[0, PROMPT : PROMPT + 3] = [token for token, *_ in wanted[:3]]
    step = p.run(work((0, 25, PROMPT - 25 + 3, 4)))
    assert [choice(step, place) for place in range(4)] == wanted
    assert np.isfinite(step.prompt_logprobs[: PROMPT - 26]).all()
    assert np.isnan(step.prompt_logprobs[PROMPT - 26 :]).all()


def test_a_guess_that_is_not_finite_costs_nothing_but_itself() -> None:
    model = Tiny()
    model.embedding[5] = float("nan")
    p, q = model.program(), model.program()
    for one in (p, q):
        put(one, 0, np.ones(PROMPT, np.int32))
        one.run(work((0, 0, PROMPT, 1)))
    step = q.run(work(guess(q, 0, [5])))
    if step.error[0]:  # the guess's values leaked into a masked product: nothing may have been taken
        assert q.length[0] == PROMPT + 1
        step = q.run(work((0, PROMPT, 1, 1)))
    assert step.token[0] == p.run(work((0, PROMPT, 1, 1))).token[0]


BAD = {
    "more guesses than rows": (0, 29, 1, 2),
    "guesses that do not follow the known": (0, 20, 6, 3),
    "negative": (0, 29, 1, -1),
    "beyond the end": (1, 298, 3, 3),
    "a guess outside the vocabulary": (2, 29, 2, 2),
}


@pytest.mark.parametrize("name", BAD)
def test_guesses_that_do_not_fit_are_refused(name: str) -> None:
    p = Tiny().program()
    for slot, count in ((0, 30), (1, 299), (2, 30)):
        put(p, slot, np.ones(count, np.int32), 0)
    p.tokens[2, 30] = VOCABULARY
    with pytest.raises(ValueError, match="work"):
        p.run(work(BAD[name]))
    assert list(p.length[:3]) == [30, 299, 30]
