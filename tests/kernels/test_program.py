"""A recorded program: right results, independent of batch, chunk and threads; refuses work that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.kernels.tiny import VOCABULARY, Tiny, put, work
from textmill.kernels import dispatch, native
from textmill.kernels.native import Program, dense_weight


@pytest.fixture(autouse=True)
def threads_again() -> Iterator[None]:
    yield
    native.set_threads(0)


def tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).astype(np.int32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_logits_equal_the_reference(packed: bool, kv_heads: int) -> None:
    model = Tiny(packed=packed, kv_heads=kv_heads)
    p = model.program()
    ids = tokens(90)
    put(p, 0, ids)
    got = torch.from_numpy(p.logits(work((0, 0, 90, 1)), every_row=True))
    torch.testing.assert_close(got, model.logits(torch.from_numpy(ids)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_one_sequence_alone_among_others_and_in_chunks(packed: bool, count: int) -> None:
    model = Tiny(packed=packed)
    p = model.program(slots=6, half=packed, blocks=120)
    native.set_threads(count)
    ids = tokens(130)
    put(p, 0, ids)
    alone = p.logits(work((0, 0, 130, 1)), every_row=True)
    for size in (1, 7, 64):
        put(p, 1, ids)
        for slot in (2, 3):
            put(p, slot, tokens(70, slot))
        for start in range(0, 130, size):
            rows = min(size, 130 - start)
            neighbours = [(2, start % 60, 9, 0), (3, start % 50, 1, 0)]
            items = [neighbours[0], (1, start, rows, 0), neighbours[1]]
            got = p.logits(work(*items), every_row=True)[9 : 9 + rows]
            assert np.array_equal(got, alone[start : start + rows])


def test_threads_do_not_change_a_bit() -> None:
    model = Tiny(packed=True, width=128, hidden=256)
    results = []
    for count in (1, 2, 5):
        p = model.program(half=True)
        native.set_threads(count)
        put(p, 0, tokens(200))
        results.append(p.logits(work((0, 0, 200, 1)), every_row=True))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_plain_machines_agree_with_this_one() -> None:
    model = Tiny()
    before = native.instruction_set()
    results = []
    for name in (before, "portable"):
        assert native.set_instruction_set(name)
        p = model.program()
        put(p, 0, tokens(60))
        results.append(p.logits(work((0, 0, 60, 1)), every_row=True))
    native.set_instruction_set(before)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_slot_grows_as_it_is_sampled() -> None:
    p = Tiny().program()
    ids = tokens(20)
    put(p, 2, ids)
    step = p.run(work((2, 0, 20, 1)))
    for length in range(20, 40):
        logits = p.logits(work((2, length - 1, 1, 0)), every_row=True)[0]
        assert step.token[0] == logits.argmax() == p.tokens[2, length]
        assert p.length[2] == length + 1
        step = p.run(work((2, length, 1, 1)))
    assert list(p.tokens[2, :20]) == list(ids)


def test_chunks_without_sampling_choose_nothing() -> None:
    p = Tiny().program()
    put(p, 0, tokens(20))
    step = p.run(work((0, 0, 12, 0)))
    assert step.token[0] == -1
    assert p.length[0] == 20


@pytest.mark.parametrize("size", [3, 8, 50])
def test_prompt_logprobs_in_chunks(size: int) -> None:
    p = Tiny().program()  # slices of four output rows
    ids = tokens(50)
    put(p, 0, ids)
    put(p, 1, ids)
    put(p, 2, tokens(5, 9))
    p.prompt_logprobs[0] = 1
    expected = torch.from_numpy(p.logits(work((1, 0, 50, 0)), every_row=True)).log_softmax(-1)
    found: list[float] = []
    for start in range(0, 50, size):
        count = min(size, 50 - start)
        step = p.run(work((2, 0, 5, 0), (0, start, count, start + count == 50)))
        assert len(step.prompt_logprobs) == 5 + count
        assert np.isnan(step.prompt_logprobs[:5]).all()
        found.extend(step.prompt_logprobs[5:])
    assert np.isnan(found[-1])  # the token after the prompt was not known
    wanted = [expected[i, ids[i + 1]].item() for i in range(49)]
    np.testing.assert_allclose(found[:-1], wanted, rtol=1e-5, atol=1e-6)
    assert step.token[1] == expected[49].argmax()
    assert len(p.run(work((1, 49, 1, 1))).prompt_logprobs) == 0


def test_a_row_of_nan_fails_alone() -> None:
    model = Tiny()
    model.embedding[5] = float("nan")
    p = model.program()
    good, bad = tokens(30), tokens(30)
    good[good == 5] = 6
    bad[10] = 5
    put(p, 0, good)
    put(p, 1, bad)
    put(p, 2, good)
    expected = p.run(work((2, 0, 30, 1)))
    step = p.run(work((0, 0, 30, 1), (1, 0, 30, 1)))
    assert list(step.error) == [0, 1]
    assert step.token[0] == expected.token[0]
    assert step.logprob[0] == expected.logprob[0]
    assert step.token[1] == -1
    assert list(p.length[:2]) == [31, 30]


BAD_WORK: dict[str, Callable[[Program], list[tuple[int, int, int, int]]]] = {
    "slot": lambda p: [(8, 0, 1, 0)],
    "negative slot": lambda p: [(-1, 0, 1, 0)],
    "empty slot": lambda p: [(1, 0, 1, 0)],
    "beyond the tokens": lambda p: [(0, 10, 21, 0)],
    "negative start": lambda p: [(0, -1, 3, 0)],
    "no rows": lambda p: [(0, 5, 0, 0)],
    "huge": lambda p: [(0, 2**31 - 1, 2**31 - 1, 0)],
    "twice": lambda p: [(0, 0, 2, 0), (0, 2, 2, 0)],
    "samples in the middle": lambda p: [(0, 0, 29, 1)],
    "too many rows": lambda p: [(2, 0, 280, 0), (3, 0, 40, 0)],
    "block": lambda p: [(4, 0, 1, 0)],
    "token": lambda p: [(5, 0, 30, 0)],
}


@pytest.mark.parametrize("name", BAD_WORK)
def test_work_that_does_not_fit_is_refused_untouched(name: str) -> None:
    p = Tiny().program()
    put(p, 0, tokens(30))
    put(p, 2, tokens(290))
    put(p, 3, tokens(40), 0)
    put(p, 4, tokens(30), 95)
    p.block_table[4, 0] = 96
    put(p, 5, tokens(30), 0)
    p.tokens[5, 29] = VOCABULARY
    length, known = p.length.copy(), p.tokens.copy()
    items = BAD_WORK[name](p)
    for order in (items, [(0, 29, 1, 1), *items] if items[0][0] != 0 else items):
        with pytest.raises(ValueError, match="work"):
            p.run(work(*order))
    assert np.array_equal(p.length, length)
    assert np.array_equal(p.tokens, known)
    assert p.run(work((0, 0, 30, 1))).token[0] >= 0


def test_a_slot_can_be_filled_to_the_end() -> None:
    p = Tiny().program(max_total_tokens=32, max_rows=32)
    put(p, 0, tokens(32))
    assert p.run(work((0, 0, 32, 1))).token[0] == p.tokens[0, 32]
    with pytest.raises(ValueError, match="max_total_tokens"):
        p.run(work((0, 32, 1, 1)))


def test_nothing_to_do() -> None:
    assert len(Tiny().program().run(work()).token) == 0


def identity(rows: int, columns: int) -> native.NativeWeight:
    return dense_weight(torch.eye(rows, columns))


@pytest.mark.parametrize("order", ["after", "before", "both", "read twice", "product first"])
def test_additions_to_products(order: str) -> None:
    """Whatever is folded into a product, x + y stays x + y."""
    torch.manual_seed(0)
    table, a, b = torch.randn(16, 16), torch.randn(16, 16), torch.randn(16, 16)
    p = Program(max_rows=16, max_slots=1, max_total_tokens=16, vocab_size=16)
    x = p.embed(dense_weight(table))
    product = p.matmul(x, dense_weight(a))
    want_product = table @ a.T
    if order == "after":
        y, want = x + product, table + want_product
    elif order == "before":
        y, want = product + x, table + want_product
    elif order == "both":
        y, want = product + p.matmul(x, dense_weight(b)), want_product + table @ b.T
    elif order == "read twice":
        total = x + product
        y, want = total + product, table + 2 * want_product
    else:
        late = dispatch.softcap(x, 2.0)  # made after the product: it cannot be its residual
        y, want = late + product, torch.tanh(table / 2) * 2 + want_product
    p.finish(p.outputs(y))
    p.allocate(1)
    put(p, 0, np.arange(16), 0)
    p.block_table[:] = 0
    got = torch.from_numpy(p.logits(work((0, 0, 16, 0)), every_row=True))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_recording_refuses_what_does_not_fit() -> None:
    model = Tiny()
    p = Program(max_rows=8, max_slots=1, max_total_tokens=8, vocab_size=16)
    x = p.embed(identity(16, 24))
    other = Program(max_rows=8, max_slots=1, max_total_tokens=8, vocab_size=16)
    with pytest.raises(ValueError, match="another program"):
        other.scale(x, 2.0)
    with pytest.raises(ValueError, match="width"):
        p.matmul(x, identity(16, 16))
    with pytest.raises(ValueError, match="wide"):
        p.rms_norm(x, torch.ones(16), 1e-5)
    with pytest.raises(ValueError, match="rows are not"):
        p.attend(x, 0, model.spec)
    with pytest.raises(ValueError, match="outputs"):
        p.finish(x)
    y = p.outputs(x)
    with pytest.raises(ValueError, match="outputs"):
        p.scale(x, 2.0)
    with pytest.raises(ValueError, match="vocabulary"):
        p.finish(p.matmul(y, identity(8, 24)))
    p.finish(y)
    with pytest.raises(ValueError, match="finished"):
        p.scale(y, 2.0)
    with pytest.raises(ValueError, match="run"):
        p.run(work((0, 0, 1, 0)))


def test_values_share_memory() -> None:
    few, many = Tiny(layers=2).program(), Tiny(layers=8).program()
    assert many.arena_bytes == few.arena_bytes
    assert many.kv_bytes_per_block == 4 * few.kv_bytes_per_block


def test_profile_counts_what_was_done() -> None:
    p = Tiny().program()
    put(p, 0, tokens(30))
    p.run(work((0, 0, 30, 1)))
    assert p.profile() == []
    p.set_profiling(True)
    p.run(work((0, 0, 30, 0)))
    assert f"matmul {VOCABULARY}x64" not in {entry.name for entry in p.profile()}  # no output rows: no head
    p.reset_profile()
    put(p, 0, tokens(30))
    p.run(work((0, 0, 30, 1)))
    entries = {entry.name: entry for entry in p.profile()}
    assert entries["attention"].calls == 2
    assert entries["matmul 128x64"].macs == 2 * 30 * 128 * 64
    assert entries[f"matmul {VOCABULARY}x64"].calls == 1
    assert all(entry.seconds >= 0 for entry in entries.values())
    p.reset_profile()
    assert p.profile() == []
