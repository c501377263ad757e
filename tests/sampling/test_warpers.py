"""Warpers against transformers' own, where it has the same rule, and against TGI's stated formula elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from textmill.core import Sampling
from textmill.sampling import warpers
from textmill.sampling.sampler import choose


def logits_and_tokens(rows: int = 4, vocabulary: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, vocabulary, generator=generator) * 3,
        torch.randint(vocabulary, (rows, 12), generator=generator),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Sampling(repetition_penalty=1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (Sampling(top_k=5), TopKLogitsWarper(5)),
        (Sampling(top_p=0.6), TopPLogitsWarper(0.6)),
        (Sampling(typical_p=0.5), TypicalLogitsWarper(0.5)),
    ],
)
def test_equal_to_transformers(ours: Sampling, theirs: object) -> None:
    logits, tokens = logits_and_tokens()
    expected = theirs(tokens, logits.clone())  # type: ignore[operator]
    torch.testing.assert_close(warpers.process(logits, [ours] * 4, list(tokens)), expected)


def test_frequency_penalty_is_tgis() -> None:
    logits = torch.zeros(1, 5)
    out = warpers.process(logits, [Sampling(frequency_penalty=2.0)], [torch.tensor([1, 1, 3, 0])])
    torch.testing.assert_close(out, torch.tensor([[-0.5, -1.0, 0.0, -0.5, 0.0]]))


def test_rows_with_different_knobs_do_not_touch_each_other() -> None:
    logits, tokens = logits_and_tokens()
    rows = [Sampling(), Sampling(top_k=3, temperature=0.7), Sampling(top_p=0.3), Sampling(repetition_penalty=2.0)]
    together = warpers.process(logits, rows, list(tokens))
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i : i + 1], warpers.process(logits[i : i + 1], [row], [tokens[i]]))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    counts = torch.zeros(4)
    for seed in range(2000):
        choice = choose(logits, [Sampling(do_sample=True, seed=seed)], [torch.tensor([0])], [0])[0]
        assert choice is not None
        counts[choice.id] += 1
    torch.testing.assert_close(counts / 2000, logits[0].softmax(0), atol=0.03, rtol=0)


def test_greedy_takes_the_lowest_id_of_a_tie_and_reports_the_processed_logprob() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    choice = choose(logits, [Sampling(top_k=2)], [torch.tensor([3])], [3])[0]
    assert choice is not None
    assert choice.id in (1, 2)  # top_k makes the row a sampled one
    greedy = choose(logits, [Sampling()], [torch.tensor([3])], [2])[0]
    assert greedy is not None
    assert greedy.id == 1
    assert [token for token, _ in greedy.top] == [1, 2]
    assert greedy.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


def test_a_broken_row_is_reported_and_its_neighbour_is_not() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 2] = float("nan")
    first, second = choose(logits, [Sampling()] * 2, [torch.tensor([0])] * 2, [0, 0])
    assert first is None
    assert second is not None
