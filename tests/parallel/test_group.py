"""Shares of ranks: together they are the whole, and heads keep their key heads."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textmill.errors import ConfigError
from textmill.parallel.group import ALONE, Group, splits


def member(rank: int, size: int) -> Group:
    group = Group()
    group.rank, group.size = rank, size
    return group


@given(st.integers(1, 9), st.integers(0, 300), st.sampled_from([1, 32]))
def test_shares_are_the_whole_in_whole_units(size: int, total: int, unit: int) -> None:
    shares = [member(rank, size).share(total, unit) for rank in range(size)]
    assert [n for share in shares for n in share] == list(range(total))
    if total % unit == 0:
        assert all(len(share) % unit == 0 for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= unit


def test_what_does_not_divide_evenly_stays_whole() -> None:
    assert [member(rank, 2).even(10) for rank in range(2)] == [range(5), range(5, 10)]
    assert [member(rank, 2).even(11) for rank in range(2)] == [range(11), range(11)]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_every_head_reads_the_key_head_it_read_on_one_rank(size: int, keys: int, queries_each: int) -> None:
    queries = keys * queries_each
    if size not in splits(queries, keys):
        with pytest.raises(ConfigError, match=rf"{queries} attention heads.*over {size} ranks"):
            member(0, size).heads(queries, keys)
        return
    seen = []
    for rank in range(size):
        ours, theirs = member(rank, size).heads(queries, keys)
        assert len(ours) % len(theirs) == 0
        for place, head in enumerate(ours):
            seen.append(head)
            assert theirs[place // (len(ours) // len(theirs))] == head // queries_each
    assert seen == list(range(queries))


def test_heads_that_cannot_be_split_are_named_with_what_can_be_done() -> None:
    with pytest.raises(ConfigError, match=r"71 attention heads with 1 key/value heads .* 2 ranks; .* can be 1$"):
        member(0, 2).heads(71, 1)
    with pytest.raises(ConfigError, match=r"can be 1, 2, 3, 6, 12, 24$"):
        member(0, 5).heads(24, 6)


def test_alone_is_free() -> None:
    value = object()
    assert ALONE.all_reduce(value) is value
    assert ALONE.gather(value) is value
    assert ALONE.heads(71, 1) == (range(71), range(1))


def test_one_rank_imports_nothing_of_torch() -> None:
    code = "import sys, textmill.models.llama, textmill.parallel.group; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
