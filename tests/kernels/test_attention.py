"""Paged attention equals the reference in all its variants, and its bits depend on nothing but the sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.tiny import put, rope, work
from textmill.kernels import native, reference
from textmill.kernels.native import Program, dense_weight
from textmill.kernels.spec import AttentionSpec

POSITIONS = 1300


class Case:
    """One attention layer over the rows that a table gives for tokens; the output width is the vocabulary."""

    def __init__(self, half: bool = True, heads: int = 6, kv_heads: int = 2, dim: int = 24, **variant: Any) -> None:
        torch.manual_seed(3)
        rotary = variant.pop("rotary", dim)
        cos, sin = rope(rotary, POSITIONS)
        turning = {"rope_cos": cos, "rope_sin": sin} if rotary else {}
        self.spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, **turning, **variant)
        self.vocabulary = heads * dim
        self.table = torch.randn(self.vocabulary, (heads + 2 * kv_heads) * dim) * 1.5
        self.half = half
        self.tokens = torch.randint(0, self.vocabulary, (POSITIONS,))

    def program(self, slots: int = 4, max_rows: int = POSITIONS) -> Program:
        kind = "float16" if self.half else "float32"
        p = Program(
            max_rows=max_rows, max_slots=slots, max_total_tokens=POSITIONS, vocab_size=self.vocabulary, kv_dtype=kind
        )
        p.finish(p.outputs(p.attend(p.embed(dense_weight(self.table)), 0, self.spec)))
        p.allocate(slots * p.block_table.shape[1])
        rng = np.random.default_rng(5)
        shuffled = rng.permutation(slots * p.block_table.shape[1])
        for slot in range(slots):
            put(p, slot, self.tokens.roll(slot).numpy())
        p.block_table[:] = shuffled.reshape(slots, -1)
        return p

    def expected(self, start: int, count: int, slot: int = 0) -> torch.Tensor:
        spec, dtype = self.spec, torch.float16 if self.half else torch.float32
        cache = [torch.zeros(POSITIONS // 16 + 1, spec.kv_heads, 16, spec.head_dim, dtype=dtype) for _ in range(2)]
        table = torch.arange(len(cache[0])).unsqueeze(0)
        rows = self.table[self.tokens.roll(slot)[: start + count]]
        return reference.attend(rows, cache[0], cache[1], table, [(0, 0, start + count)], spec)[start:]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"half": False},
    "window": {"window": 33},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.1, 0.05, 0.01]), "rotary": 0},
    "interleaved": {"rope_interleaved": True},
    "partial": {"rotary": 8},
    "partial_interleaved": {"rotary": 16, "rope_interleaved": True},
    "head_norm": {"q_norm": torch.linspace(0.5, 1.5, 24), "k_norm": torch.linspace(1.5, 0.5, 24)},
    "whole_norm": {"q_norm": torch.linspace(0.5, 1.5, 144), "k_norm": torch.linspace(1.5, 0.5, 48)},
    "layer_norm_shared": {
        "head_norm": "layer",
        "q_norm": torch.linspace(0.5, 1.5, 24),
        "k_norm": torch.linspace(1.5, 0.5, 24),
        "q_norm_bias": torch.linspace(-1, 1, 24),
        "k_norm_bias": torch.linspace(1, -1, 24),
    },
    "layer_norm_by_head": {
        "head_norm": "layer",
        "q_norm": torch.linspace(0.5, 1.5, 144).view(6, 24),
        "k_norm": torch.linspace(1.5, 0.5, 48).view(2, 24),
    },
    "layer_norm_over_all": {
        "head_norm": "layer",
        "q_norm": torch.linspace(0.5, 1.5, 144),
        "k_norm": torch.linspace(1.5, 0.5, 48),
        "q_norm_bias": torch.linspace(-1, 1, 144),
        "k_norm_bias": torch.linspace(1, -1, 48),
    },
    "no_group": {"heads": 3, "kv_heads": 3},
    "one_kv_head": {"heads": 8, "kv_heads": 1, "dim": 64},
    "many_in_a_group": {"heads": 60, "kv_heads": 1, "dim": 8},
    "odd_width": {"heads": 4, "dim": 20},
    "wide": {"heads": 7, "kv_heads": 1, "dim": 128},
    "widest": {"heads": 4, "kv_heads": 2, "dim": 256, "window": 100},
    "all": {"window": 70, "softcap": 4.0, "half": False, "rotary": 12, "alibi": torch.full((6,), 0.01)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference(name: str) -> None:
    case = Case(**VARIANTS[name])
    got = case.program().logits(work((0, 0, 150, 0)), every_row=True)
    tolerance = 4e-3 if case.half else 2e-5
    torch.testing.assert_close(torch.from_numpy(got), case.expected(0, 150), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["plain", "float32", "all", "odd_width", "window", "softcap", "alibi", "wide"])
def test_plain_machines_too(name: str) -> None:
    before = native.instruction_set()
    assert native.set_instruction_set("portable")
    case = Case(**VARIANTS[name])
    p = case.program()
    whole = p.logits(work((0, 0, 90, 0)), every_row=True)
    one_by_one = [p.logits(work((0, i, 1, 0)), every_row=True) for i in range(60, 90)]
    native.set_instruction_set(before)
    tolerance = 4e-3 if case.half else 2e-5
    torch.testing.assert_close(torch.from_numpy(whole), case.expected(0, 90), rtol=tolerance, atol=tolerance)
    assert np.array_equal(np.concatenate(one_by_one), whole[60:])


def test_long_contexts_in_ranges() -> None:
    case = Case(half=False)
    p = case.program()
    got = p.logits(work((0, 0, POSITIONS, 0)), every_row=True)
    torch.testing.assert_close(torch.from_numpy(got), case.expected(0, POSITIONS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variant", ["plain", "window", "all", "one_kv_head", "many_in_a_group"])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_cut(variant: str, threads: int) -> None:
    case = Case(**VARIANTS[variant])
    native.set_threads(threads)
    whole = case.program().logits(work((0, 0, 700, 0)), every_row=True)
    for size in (1, 7, 64):
        p = case.program()
        first = 0 if size > 1 else 560  # one at a time: only the end, on top of one chunk
        if first:
            assert np.array_equal(p.logits(work((0, 0, first, 0)), every_row=True), whole[:first])
        for start in range(first, 700, size):
            count = min(size, 700 - start)
            part = p.logits(work((0, start, count, 0)), every_row=True)
            assert np.array_equal(part, whole[start : start + count]), (size, start)
    native.set_threads(0)


@given(
    st.lists(
        st.tuples(st.integers(0, 600), st.integers(1, 120)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_batches_equal_single_sequences(spans: list[tuple[int, int]]) -> None:
    case = SHARED
    together, alone = case.program(), case.program()
    for p in (together, alone):
        for slot, (start, _) in enumerate(spans):
            if start:
                p.logits(work((slot, 0, start, 0)))
    items = [(slot, start, count, 0) for slot, (start, count) in enumerate(spans)]
    batch = together.logits(work(*items), every_row=True)
    single = [alone.logits(work(item), every_row=True) for item in items]
    assert np.array_equal(batch, np.concatenate(single))


SHARED = Case(window=300)


def test_a_long_context_among_short_ones_is_shared_by_the_threads() -> None:
    case = Case()
    native.set_threads(2)
    p = case.program(slots=8)
    starts = [1200, *range(10, 17)]
    for slot, start in enumerate(starts):
        p.logits(work((slot, 0, start, 0)))
    items = [(slot, start, 1, 0) for slot, start in enumerate(starts)]
    batch = p.logits(work(*items), every_row=True)
    native.set_threads(1)
    assert np.array_equal(batch, np.concatenate([p.logits(work(item), every_row=True) for item in items]))
    native.set_threads(0)


def test_what_other_sequences_left_in_a_block_is_never_read() -> None:
    case = Case()
    case.table[7] = float("nan")
    case.tokens[case.tokens == 7] = 8
    p = case.program()
    p.tokens[1, :200] = 7
    p.block_table[1] = p.block_table[0]
    assert np.isnan(p.logits(work((1, 0, 200, 0)), every_row=True)).all()
    for start, count in ((0, 21), (21, 1), (22, 9)):
        assert np.isfinite(p.logits(work((0, start, count, 0)), every_row=True)).all()


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_values_of_very_different_sizes(factor: float) -> None:
    case = Case(rotary=0)
    values = (case.spec.heads + case.spec.kv_heads) * case.spec.head_dim
    case.table[::3, values:] *= factor
    case.tokens[:3] = 3
    got = case.program().logits(work((0, 0, 150, 0)), every_row=True)
    expected = case.expected(0, 150)
    tolerance = 4e-3 * max(1.0, factor)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=4e-3, atol=tolerance)


def test_large_keys_do_not_overflow_a_half() -> None:
    case = Case(rotary=0)
    case.table[:, case.spec.heads * case.spec.head_dim] = 1e6
    assert np.isfinite(case.program().logits(work((0, 0, 40, 0)), every_row=True)).all()
