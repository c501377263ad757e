"""The native sampler chooses what textmill.sampling, the meaning, chooses: every knob alone, and all together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.tiny import put, work
from textmill.core import Sampling
from textmill.kernels.native import Program, StepArrays, dense_weight
from textmill.sampling import sampler, warpers

WIDE, NARROW = 3000, 40


class Source:
    """A program whose logits are a fixed row per input token: the token at the end of a slot picks the row."""

    def __init__(self, logits: torch.Tensor, slots: int = 32) -> None:
        rows, vocabulary = logits.shape
        self.logits = logits
        table = torch.zeros(vocabulary, rows)
        table[:rows] = torch.eye(rows)
        self.program = Program(max_rows=64, max_slots=slots, max_total_tokens=64, vocab_size=vocabulary, max_outputs=5)
        p = self.program
        p.finish(p.matmul(p.outputs(p.embed(dense_weight(table))), dense_weight(logits.T)))
        p.allocate(1)
        p.block_table[:] = 0

    def choose(self, rows: list[tuple[list[int], Sampling]], top_n: int = 0) -> StepArrays:
        p = self.program
        for slot, (tokens, sampling) in enumerate(rows):
            put(p, slot, tokens, 0)
            p.block_table[slot] = 0
            for name in ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty"):
                getattr(p, name)[slot] = getattr(sampling, name)
            p.draws[slot], p.seed[slot], p.top_n[slot] = sampling.draws, sampling.seed, top_n
        return p.run(work(*[(slot, len(tokens) - 1, 1, 1) for slot, (tokens, _) in enumerate(rows)]))

    def expected(self, rows: list[tuple[list[int], Sampling]], top_n: int = 0) -> list[Any]:
        logits = torch.stack([self.logits[tokens[-1]] for tokens, _ in rows])
        known = [torch.tensor(tokens) for tokens, _ in rows]
        return sampler.choose(logits, [sampling for _, sampling in rows], known, [top_n] * len(rows))


@pytest.fixture(scope="module")
def wide() -> Source:
    torch.manual_seed(11)
    return Source(torch.randn(8, WIDE) * torch.tensor([0.01, 0.3, 1, 2, 3, 4, 8, 1]).unsqueeze(1))


KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "plain draw": {"do_sample": True},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 5},
    "top_k_many": {"top_k": 2000},
    "top_k_beyond": {"top_k": 5000},
    "top_p": {"top_p": 0.9},
    "top_p_tiny": {"top_p": 1e-6},
    "top_p_nearly_all": {"top_p": 0.9999},
    "typical": {"typical_p": 0.8},
    "typical_tiny": {"typical_p": 1e-6},
    "repetition": {"repetition_penalty": 1.3},
    "repetition_draw": {"repetition_penalty": 0.8, "do_sample": True},
    "frequency": {"frequency_penalty": 1.5},
    "all": {
        "temperature": 0.9, "top_k": 300, "top_p": 0.95, "typical_p": 0.9, "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KNOBS)
def test_equals_the_meaning(wide: Source, name: str) -> None:
    generator = np.random.default_rng(len(name))
    rows = []
    for i in range(24):
        tokens = [*generator.integers(0, WIDE, i % 9), *generator.integers(0, 8, 3), i % 8]
        seed = int(generator.integers(0, 2**64, dtype=np.uint64))
        rows.append(([int(t) for t in tokens], Sampling(seed=seed, **KNOBS[name])))
    got, expected = wide.choose(rows, top_n=4), wide.expected(rows, top_n=4)
    assert not got.error.any()
    for i, choice in enumerate(expected):
        assert got.token[i] == choice.id
        assert got.logprob[i] == pytest.approx(choice.logprob, abs=2e-5)
        assert got.top_count[i] == 4
        for (token, logprob), native_token, native_logprob in zip(
            choice.top, got.top_ids[i], got.top_logprobs[i], strict=True
        ):
            assert native_logprob == pytest.approx(logprob, abs=2e-5)
            if logprob > -math.inf:
                assert token == native_token


def kept_by_draws(source: Source, sampling: dict[str, Any], count: int) -> set[int]:
    found: set[int] = set()
    for begin in range(0, count, 32):
        rows = [([0], Sampling(seed=begin + i, do_sample=True, **sampling)) for i in range(32)]
        found.update(source.choose(rows).token.tolist())
    return found


@given(
    st.lists(st.floats(-20, 20, width=16), min_size=NARROW, max_size=NARROW),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.6}, {"typical_p": 0.5}, {"top_k": 10, "top_p": 0.8}]),
)
@settings(max_examples=20, deadline=None)
def test_draws_stay_within_what_the_warpers_keep(values: list[float], sampling: dict[str, Any]) -> None:
    logits = torch.tensor([values])
    processed = warpers.process(logits, [Sampling(do_sample=True, **sampling)], [torch.tensor([0])])
    log_probabilities = processed.log_softmax(-1)[0]
    drawn = kept_by_draws(Source(logits), sampling, 64)
    # A cut at a float32 boundary may fall on either side in float64: only clearly excluded tokens count.
    if "top_p" not in sampling and "typical_p" not in sampling:
        assert all(log_probabilities[token] > -math.inf for token in drawn)
    top_token = int(logits[0].argmax())
    if "typical_p" not in sampling and logits[0].max() - logits[0].sort().values[-2] > 15:
        assert drawn == {top_token}


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    source = Source(probabilities.log().unsqueeze(0))
    counts = np.zeros(4)
    for begin in range(0, 4000, 32):
        step = source.choose([([0], Sampling(seed=begin * 7919 + i, do_sample=True)) for i in range(32)])
        counts += np.bincount(step.token, minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), probabilities.numpy(), atol=0.03)


def test_a_token_depends_on_seed_and_position_alone(wide: Source) -> None:
    sampling = Sampling(seed=2**63 + 12345, do_sample=True, temperature=1.5)
    alone = wide.choose([([5, 6, 3], sampling)]).token[0]
    others = [([i % 8], Sampling(seed=i, do_sample=True)) for i in range(20)]
    assert wide.choose([*others, ([5, 6, 3], sampling)]).token[20] == alone
    elsewhere = {int(wide.choose([([5] * n + [3], sampling)]).token[0]) for n in range(8)}
    assert len(elsewhere) > 1


def test_ties_go_to_the_lowest_id() -> None:
    source = Source(torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, -1.0]]))
    step = source.choose([([0], Sampling())], top_n=4)
    assert step.token[0] == 1
    assert step.top_ids[0].tolist() == [1, 2, 4, 0]
    # Tokens that tie with the k-th stay.
    assert kept_by_draws(source, {"top_k": 1}, 128) == {1, 2, 4}


def test_alternatives_beyond_what_is_kept_are_minus_infinity() -> None:
    step = Source(torch.tensor([[1.0, 5.0, 3.0, 0.0]])).choose([([0], Sampling(top_k=2, seed=1))], top_n=4)
    assert step.top_ids[0].tolist() == [1, 2, 0, 3]
    assert np.isneginf(step.top_logprobs[0, 2:]).all()
    assert np.exp(step.top_logprobs[0, :2]).sum() == pytest.approx(1.0, abs=1e-6)
    small = Source(torch.tensor([[1.0, 2.0]])).choose([([0], Sampling())], top_n=5)
    assert small.top_count[0] == 2


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_logits_are_that_rows_error(broken: float) -> None:
    table = torch.randn(16, 16)
    table[3, 7] = broken
    table[4] = -math.inf
    table[5, 3] = -math.inf  # a masked token is no error
    p = Program(max_rows=8, max_slots=8, max_total_tokens=8, vocab_size=16)
    p.finish(p.outputs(p.embed(dense_weight(table))))
    p.allocate(1)
    for slot in range(4):
        put(p, slot, [slot + 2], 0)
        p.block_table[slot] = 0
    step = p.run(work(*[(slot, 0, 1, 1) for slot in range(4)]))
    assert step.error.tolist() == [0, 1, 1, 0]
    assert step.token.tolist() == [int(table[2].argmax()), -1, -1, int(table[5].argmax())]


@pytest.mark.parametrize(
    "field", [{"temperature": 0.0}, {"temperature": math.nan}, {"repetition_penalty": 0.0}, {"top_p": math.nan}]
)
def test_senseless_parameters_are_that_rows_error(wide: Source, field: dict[str, Any]) -> None:
    step = wide.choose([([1], Sampling()), ([1], Sampling(**field)), ([2], Sampling())])
    assert step.error.tolist() == [0, 2, 0]


def test_a_temperature_that_overflows_is_that_rows_error(wide: Source) -> None:
    assert wide.choose([([6], Sampling(temperature=1e-38))]).error.tolist() == [2]
