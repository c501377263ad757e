"""A recorded mixture of experts: what the reference means, to the last bit the same whatever stands beside a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.tiny import put, random_packed, work
from textmill.kernels import dispatch, native
from textmill.kernels.native import NativeWeight, Program, Unrecordable, dense_weight, pack_weight
from textmill.kernels.spec import ExpertsSpec

WIDTH, INNER, EXPERTS, TOKENS = 64, 96, 6, 64


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = native.instruction_set()
    yield
    native.set_instruction_set(before)
    native.set_threads(0)


class Mixture:
    """Rows of a table go through one mixture; logits are its results."""

    def __init__(self, kind: str = "packed", spec: ExpertsSpec | None = None) -> None:
        torch.manual_seed(4)
        self.spec = spec or ExpertsSpec(2, "silu")
        self.table = torch.randn(TOKENS, WIDTH)
        self.router = torch.randn(EXPERTS, WIDTH) / WIDTH**0.5
        self.gate_up = [self.matrix(2 * INNER, WIDTH, kind != "dense") for _ in range(EXPERTS)]
        self.down = [self.matrix(WIDTH, INNER, kind == "packed") for _ in range(EXPERTS)]

    @staticmethod
    def matrix(n: int, k: int, packed: bool) -> Any:
        return random_packed(n, k, 4, 32, True) if packed else torch.randn(n, k) / k**0.5

    def expected(self, tokens: np.ndarray) -> torch.Tensor:
        x = self.table[torch.from_numpy(tokens).long()]
        scores = dispatch.matmul(x, self.router)
        found = dispatch.experts(x, scores, self.gate_up, self.down, self.spec)
        assert isinstance(found, torch.Tensor)
        return found

    def program(self, slots: int = 3, rows: int = 200) -> Program:
        p = Program(max_rows=rows, max_slots=slots, max_total_tokens=200, vocab_size=TOKENS)
        x = p.embed(dense_weight(self.table))
        scores = dispatch.matmul(x, dense_weight(self.router))
        forms = [[form(matrix) for matrix in matrices] for matrices in (self.gate_up, self.down)]
        found = dispatch.experts(x, scores, *forms, self.spec)
        p.finish(p.outputs(found))  # type: ignore[arg-type]
        p.allocate(slots * p.block_table.shape[1])
        return p


def form(m: Any) -> NativeWeight:
    if isinstance(m, torch.Tensor):
        return dense_weight(m)
    return pack_weight(m.codes, m.scales, m.offsets, m.zero, m.bits, m.group)


def tokens_of(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TOKENS, count).astype(np.int32)


def results(p: Program, tokens: np.ndarray, slot: int = 0) -> np.ndarray:
    put(p, slot, tokens)
    return p.logits(work((slot, 0, len(tokens), 0)), every_row=True)


@pytest.mark.parametrize("machine", ["best", "portable"])
@pytest.mark.parametrize("kind", ["packed", "dense", "packed up, dense down"])
def test_equals_the_reference(kind: str, machine: str) -> None:
    if machine == "portable":
        native.set_instruction_set(machine)
    mixture, tokens = Mixture(kind), tokens_of(90)
    got = torch.from_numpy(results(mixture.program(), tokens))
    expected = mixture.expected(tokens)
    if kind == "packed":  # a code on an edge may round either way
        error = (got - expected).abs() / expected.std()
        assert float(error.median()) < 1e-5
        assert float(error.max()) < 0.02
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        ExpertsSpec(1, "gelu"),
        ExpertsSpec(3, "silu", None),
        ExpertsSpec(4, "relu", 2.0),
        ExpertsSpec(EXPERTS, "silu", 3.0),
    ],
    ids=str,
)
def test_every_way_to_weigh(spec: ExpertsSpec) -> None:
    mixture, tokens = Mixture("dense", spec), tokens_of(40)
    torch.testing.assert_close(
        torch.from_numpy(results(mixture.program(), tokens)), mixture.expected(tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_neighbours_or_chunks(kind: str, threads: int) -> None:
    mixture, tokens = Mixture(kind), tokens_of(130)
    native.set_threads(threads)
    whole = results(mixture.program(), tokens)
    p = mixture.program()
    for slot in (0, 1, 2):
        put(p, slot, tokens if slot == 1 else tokens_of(150, slot))
    for size in (1, 7, 64):
        for start in range(0, 130, size):
            count = min(size, 130 - start)
            items = [(0, start % 90, 23, 0), (1, start, count, 0), (2, start % 140, 3, 0)]
            got = p.logits(work(*items), every_row=True)[23 : 23 + count]
            assert np.array_equal(got, whole[start : start + count]), (size, start)


def test_what_is_not_finite_stays_in_its_row() -> None:
    mixture, tokens = Mixture(), tokens_of(20)
    whole = results(mixture.program(), tokens)
    mixture.table[int(tokens[3])] = torch.nan
    broken = results(mixture.program(), tokens)
    hit = tokens == tokens[3]
    assert not np.isfinite(broken[hit]).any()
    assert np.array_equal(broken[~hit], whole[~hit])


def test_work_is_counted_by_expert() -> None:
    mixture = Mixture("dense", ExpertsSpec(1, "silu"))
    p = mixture.program()
    p.set_profiling(True)
    results(p, tokens_of(1))
    [entry] = [entry for entry in p.profile() if entry.name == "experts"]
    assert entry.macs == 3 * WIDTH * INNER
    assert entry.bytes == 3 * WIDTH * INNER * 4


def test_what_does_not_fit_is_refused() -> None:
    mixture = Mixture()
    up, down = [form(m) for m in mixture.gate_up], [form(m) for m in mixture.down]
    p = Program(max_rows=4, max_slots=1, max_total_tokens=16, vocab_size=TOKENS)
    x = p.embed(dense_weight(mixture.table))
    scores = p.matmul(x, dense_weight(mixture.router))
    with pytest.raises(Unrecordable, match="mixture of experts with activation tanh"):
        p.experts(x, scores, up, down, ExpertsSpec(2, "tanh"))
    with pytest.raises(ValueError, match="one score per expert"):
        p.experts(x, scores, up[1:], down[1:], ExpertsSpec(2, "silu"))
    with pytest.raises(ValueError, match="at most to all"):
        p.experts(x, scores, up, down, ExpertsSpec(7, "silu"))
    with pytest.raises(ValueError, match="one shape"):
        p.experts(x, scores, [*up[1:], down[0]], down, ExpertsSpec(2, "silu"))
    with pytest.raises(ValueError, match="do not fit"):
        p.experts(x, scores, up, up, ExpertsSpec(2, "silu"))
