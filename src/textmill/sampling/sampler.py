"""A batch of logits becomes one token per row with its log-probability, as TGI returns it (after processing)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textmill.core import Sampling, TokenChoice
from textmill.sampling import warpers
from textmill.sampling.random_stream import uniform


def draw(log_probabilities: Tensor, seed: int, position: int) -> int:
    """Inverse of the cumulative distribution, walked in token order with double accumulation. [vocabulary] -> id."""
    probabilities = log_probabilities.double().exp()
    cumulative = probabilities.cumsum(dim=0)
    target = uniform(seed, position) * float(cumulative[-1])
    beyond = torch.nonzero((cumulative > target) & (probabilities > 0))
    last_possible = torch.nonzero(probabilities > 0)[-1]
    return int(beyond[0]) if len(beyond) else int(last_possible)


def top(log_probabilities: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens, best first, ties by id."""
    values, ids = log_probabilities.sort(dim=0, descending=True, stable=True)
    return tuple((int(i), float(v)) for i, v in zip(ids[:count], values[:count], strict=True))


def choose(
    logits: Tensor, rows: Sequence[Sampling], tokens: Sequence[Tensor], top_n: Sequence[int]
) -> list[TokenChoice | None]:
    """One choice per row of float32 logits [rows, vocabulary]; None where a row's logits are not finite numbers.

    `tokens[i]` are all tokens of sequence i so far: the chosen one will stand at position len(tokens[i]).
    """
    broken = logits.isnan().any(dim=1) | (logits == float("inf")).any(dim=1)
    log_probabilities = warpers.process(logits, rows, tokens).log_softmax(dim=-1)
    choices: list[TokenChoice | None] = []
    for row, sampling in enumerate(rows):
        if broken[row]:
            choices.append(None)
            continue
        scores = log_probabilities[row]
        token = draw(scores, sampling.seed, len(tokens[row])) if sampling.draws else int(scores.argmax())
        choices.append(TokenChoice(token, float(scores[token]), top(scores, top_n[row])))
    return choices


def prompt_logprobs(logits: Tensor, next_tokens: Tensor) -> Tensor:
    """Raw log-probabilities of the tokens that really came next: [rows, vocabulary], [rows] -> [rows]."""
    return logits.log_softmax(dim=-1).gather(1, next_tokens.long()[:, None]).squeeze(1)
