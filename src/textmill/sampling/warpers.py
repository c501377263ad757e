"""What the knobs of a request do to a row of logits, one pure function per knob, in TGI's order (`process`).

Every function takes float32 logits [rows, vocabulary] and columns of parameters [rows, 1] (or per-row tokens)
and returns logits of the same shape; excluded tokens become -inf. Sources: TGI's batched logits chooser;
Holtzman et al. 2019 (top-p); Meister et al. 2022 (typical); Keskar et al. 2019 (repetition penalty).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textmill.core import Sampling


def repetition_penalty(logits: Tensor, tokens: Sequence[Tensor], penalty: Tensor) -> Tensor:
    """Divides the positive and multiplies the negative scores of every token seen, prompt included."""
    out = logits.clone()
    for row, seen in enumerate(tokens):
        ids = torch.unique(seen).long()
        score = logits[row, ids]
        out[row, ids] = torch.where(score < 0, score * penalty[row], score / penalty[row])
    return out


def frequency_penalty(logits: Tensor, tokens: Sequence[Tensor], penalty: Tensor) -> Tensor:
    """Subtracts penalty x (a token's share of the sequence so far, prompt included): TGI's rule, not OpenAI's."""
    out = logits.clone()
    for row, seen in enumerate(tokens):
        counts = torch.bincount(seen.long(), minlength=logits.shape[1]).to(logits.dtype)
        out[row] -= penalty[row] * (counts / max(1, seen.numel()))
    return out


def temperature(logits: Tensor, value: Tensor) -> Tensor:
    return logits / value


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keeps the k best (0: all); tokens that tie with the k-th stay, as in TGI."""
    vocabulary = logits.shape[1]
    wanted = torch.where(k <= 0, vocabulary, k).clamp(max=vocabulary).long()
    ordered = logits.sort(dim=-1, descending=True).values
    threshold = ordered.gather(1, wanted - 1)
    return logits.masked_fill(logits < threshold, float("-inf"))


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Drops the least likely tokens whose probabilities together stay within 1 - p; keeps at least one."""
    ordered, index = logits.sort(dim=-1, descending=False, stable=True)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop[:, -1] = False
    drop &= p < 1.0
    return logits.masked_fill(drop.scatter(1, index, drop), float("-inf"))


def typical_p(logits: Tensor, mass: Tensor) -> Tensor:
    """Keeps the tokens whose surprise is closest to the entropy until they carry `mass`."""
    log_probabilities = logits.log_softmax(dim=-1)
    probabilities = log_probabilities.exp()
    entropy = -(log_probabilities * probabilities).nansum(dim=-1, keepdim=True)
    distance = (-log_probabilities - entropy).abs()
    _, index = distance.sort(dim=-1, descending=False, stable=True)
    cumulative = probabilities.gather(1, index).cumsum(dim=-1)
    last = (cumulative < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    rank = torch.arange(logits.shape[1]).expand_as(index)
    drop_sorted = (rank > last) & (mass < 1.0)
    return logits.masked_fill(torch.zeros_like(drop_sorted).scatter(1, index, drop_sorted), float("-inf"))


def process(logits: Tensor, rows: Sequence[Sampling], tokens: Sequence[Tensor]) -> Tensor:
    """All warpers in TGI's order over a batch; `tokens[i]` are all tokens of sequence i so far."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([[getattr(row, name)] for row in rows], dtype=dtype)

    if any(row.repetition_penalty != 1.0 for row in rows):
        logits = repetition_penalty(logits, tokens, column("repetition_penalty"))
    if any(row.frequency_penalty != 0.0 for row in rows):
        logits = frequency_penalty(logits, tokens, column("frequency_penalty"))
    if any(row.temperature != 1.0 for row in rows):
        logits = temperature(logits, column("temperature"))
    if any(row.top_k > 0 for row in rows):
        logits = top_k(logits, column("top_k", torch.int64))
    if any(row.top_p < 1.0 for row in rows):
        logits = top_p(logits, column("top_p"))
    if any(row.typical_p < 1.0 for row in rows):
        logits = typical_p(logits, column("typical_p"))
    return logits
