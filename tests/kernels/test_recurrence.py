"""Recorded convolutions and scans: what the reference means, whatever a sequence's rows are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.tiny import put, work
from textmill.kernels import native, recurrence
from textmill.kernels.native import Program, dense_weight
from textmill.kernels.spec import ConvolutionSpec, ScanSpec

TOKENS = 128


@pytest.fixture(params=["best", "portable"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.instruction_set()
    if request.param == "portable":
        assert native.set_instruction_set("portable")
    yield
    native.set_instruction_set(before)
    native.set_threads(0)


class Mixer:
    """[x | gate] of a token from a table; x through a convolution and a scan; steps, b and c are rows of tables too."""

    def __init__(self, channels: int = 77, columns: int = 6, taps: int = 4) -> None:
        torch.manual_seed(channels)
        self.channels, self.columns, self.taps = channels, columns, taps
        self.both = torch.randn(TOKENS, 2 * channels)
        self.step, self.bc = torch.randn(TOKENS, channels) * 3, torch.randn(TOKENS, 2 * columns)
        self.convolution = ConvolutionSpec(torch.randn(channels, taps), torch.randn(channels))
        self.scanning = ScanSpec(-torch.rand(channels, columns) - 0.05, torch.randn(channels))

    def program(self, slots: int = 3) -> Program:
        p = Program(max_rows=200, max_slots=slots, max_total_tokens=200, vocab_size=TOKENS)
        both, step, bc = (p.embed(dense_weight(table)) for table in (self.both, self.step, self.bc))
        y = p.scan(p.convolve(both, self.convolution), step, bc, both, self.scanning)
        p.finish(p.outputs(p.matmul(y, dense_weight(torch.eye(TOKENS, self.channels)))))
        p.allocate(slots * p.block_table.shape[1])
        return p

    def expected(self, tokens: np.ndarray) -> torch.Tensor:
        states = torch.zeros(1, self.channels, self.taps - 1), torch.zeros(1, self.channels, self.columns)
        ids, items = torch.from_numpy(tokens).long(), [(0, 0, len(tokens))]
        both = self.both[ids]
        x = recurrence.convolve(both, states[0], items, self.convolution)
        return recurrence.scan(x, self.step[ids], self.bc[ids], both, states[1], items, self.scanning)


def tokens_of(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TOKENS, count).astype(np.int32)


def results(p: Program, tokens: np.ndarray, slot: int = 0) -> np.ndarray:
    put(p, slot, tokens)
    return p.logits(work((slot, 0, len(tokens), 0)), every_row=True)


@pytest.mark.parametrize("sizes", [{}, {"channels": 128, "columns": 16}, {"channels": 5, "taps": 2}], ids=str)
def test_equals_the_reference(sizes: dict[str, Any]) -> None:
    mixer, tokens = Mixer(**sizes), tokens_of(90)
    got = torch.from_numpy(results(mixer.program(), tokens))[:, : mixer.channels]
    torch.testing.assert_close(got, mixer.expected(tokens), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_neighbours_or_chunks(threads: int) -> None:
    mixer, tokens = Mixer(), tokens_of(100)
    native.set_threads(threads)
    whole = results(mixer.program(), tokens)
    for size in (1, 2, 7, 64):
        p = mixer.program()
        for slot in (0, 1, 2):
            put(p, slot, tokens if slot == 1 else tokens_of(150, slot))
        for start in range(0, 100, size):
            count = min(size, 100 - start)
            items = [(0, start, 9, 0), (1, start, count, 0), (2, start, 1, 0)]
            got = p.logits(work(*items), every_row=True)[9 : 9 + count]
            assert np.array_equal(got, whole[start : start + count]), (size, start)


def test_a_slot_begins_anew() -> None:
    mixer, tokens = Mixer(), tokens_of(40)
    p = mixer.program()
    first = results(p, tokens)
    mixer.both[int(tokens[0])] = torch.nan
    broken = mixer.program()
    assert np.isnan(results(broken, tokens)).any()
    others = tokens_of(30, 5)
    others = others[others != tokens[0]]
    assert np.isfinite(results(broken, others)).all()
    results(p, others)
    assert np.array_equal(results(p, tokens), first)
