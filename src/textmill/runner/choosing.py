"""What every torch executor does with a step's logits: prompt log-probabilities, then the next token or tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textmill.core import Sampled, SlotWork, TokenChoice
from textmill.runner.runner import NOT_FINITE
from textmill.runner.slots import Tables, sampling_of
from textmill.sampling.sampler import choose, prompt_logprobs


def sampling_rows(item: SlotWork) -> int:
    """Rows at the end of the item after which a token is chosen: that of the newest known token, and the guesses'."""
    return 1 + len(item.draft) if item.samples else 0


def wanted_count(item: SlotWork, tables: Tables) -> int:
    """How many of the item's last rows need logits: all with prompt log-probabilities, else those that sample."""
    return item.count if tables.prompt_logprobs[item.slot] else sampling_rows(item)


def wanted_rows(work: Sequence[SlotWork], tables: Tables) -> list[int]:
    """Those rows of all items, counted through the step."""
    rows: list[int] = []
    end = 0
    for item in work:
        end += item.count
        rows += range(end - wanted_count(item, tables), end)
    return rows


def finish(item: SlotWork, logits: Tensor, tables: Tables) -> Sampled:
    """Log-probabilities of the prompt tokens the wanted rows predicted, then the next token, or tokens.

    `logits` [wanted rows of the item, vocabulary]. Chosen tokens are written into the tables.
    """
    slot = item.slot
    known = torch.from_numpy(tables.tokens[slot, : tables.length[slot]])
    scored: tuple[float, ...] = ()
    if tables.prompt_logprobs[slot]:
        following = known[item.start + 1 : item.start + 1 + item.count]
        scored = tuple(prompt_logprobs(logits[: len(following)], following).tolist())
    if not item.samples:
        return Sampled(slot, None, scored)
    chosen = choose_tokens(item, logits[-sampling_rows(item) :], len(known), tables)
    if not chosen:
        return Sampled(slot, None, scored, NOT_FINITE)
    tables.length[slot] += len(chosen)
    tables.tokens[slot, len(known) : tables.length[slot]] = [token.id for token in chosen]
    return Sampled(slot, chosen[0], scored, more=tuple(chosen[1:]))


def choose_tokens(item: SlotWork, logits: Tensor, length: int, tables: Tables) -> list[TokenChoice]:
    """A token after the newest known one and after every right guess; none after a row that is not finite."""
    slot = item.slot
    tokens = torch.from_numpy(tables.tokens[slot])
    chosen: list[TokenChoice] = []
    for row, guess in enumerate((*item.draft, None)):
        known = [tokens[: length + row]]
        token = choose(logits[row : row + 1], [sampling_of(tables, slot)], known, [int(tables.top_n[slot])])[0]
        if token is None:
            break
        chosen.append(token)
        if token.id != guess:
            break
    return chosen
