"""Blocks: counted exactly, blank ones first, cached ones given up oldest first."""

from __future__ import annotations

import pytest

from textmill.engine.blocks import BlockPool, IntegrityError


def test_low_numbers_first_and_last_freed_first() -> None:
    pool = BlockPool(8)
    first = pool.take(3)
    assert first == [0, 1, 2]
    pool.release(first)
    assert pool.take(2) == [0, 1]
    assert pool.used == 2


def test_cached_blocks_are_taken_only_after_blank_ones_oldest_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(4)
    pool.on_evict = evicted.append
    a, b = pool.take(2)
    pool.keep(a)
    pool.keep(b)
    pool.release([a])
    pool.release([b])
    assert pool.evictable == 2
    assert set(pool.take(2)).isdisjoint({a, b})
    assert evicted == []
    assert pool.take(2) == [a, b]
    assert evicted == [a, b]


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    chain = pool.take(3)
    for block in chain:
        pool.keep(block)
    pool.release(chain)
    assert pool.take(3) == list(reversed(chain))


def test_shared_blocks_stay_until_the_last_holder_leaves() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.keep(block)
    pool.share([block])
    pool.release([block])
    assert pool.used == 1
    pool.check([[block]])
    pool.release([block])
    assert (pool.used, pool.unheld([block])) == (0, 1)
    pool.share([block])
    assert pool.used == 1
    pool.check([[block]])


def test_forgotten_blocks_become_blank() -> None:
    pool = BlockPool(2)
    held, free = pool.take(2)
    pool.keep(held)
    pool.keep(free)
    pool.release([free])
    pool.forget(free)
    pool.forget(held)
    assert pool.evictable == 0
    pool.release([held])
    assert pool.evictable == 0
    pool.check([])


def test_taking_too_many_is_an_error() -> None:
    with pytest.raises(IntegrityError):
        BlockPool(2).take(3)


def test_check_finds_leaks_and_double_use() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    with pytest.raises(IntegrityError, match="holders"):
        pool.check([blocks[:1]])
    with pytest.raises(IntegrityError, match="holders"):
        pool.check([blocks, blocks])
    pool.release(blocks)
    pool.release(blocks[:1])
    with pytest.raises(IntegrityError):
        pool.check([])
