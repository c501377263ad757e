"""The prefix cache finds what is really there, for the right tenant, and nothing else."""

from __future__ import annotations

from textmill.core import Request
from textmill.engine.blocks import BlockPool
from textmill.engine.prefix import PrefixCache
from textmill.engine.sequence import Sequence

SIZE = 4


def sequence(tokens: list[int], salt: bytes = b"", prompt_logprobs: bool = False) -> Sequence:
    request = Request(0, tuple(tokens), 100, cache_salt=salt, prompt_logprobs=prompt_logprobs)
    return Sequence(request, 1, len(tokens) + 100)


def stored(cache: PrefixCache, pool: BlockPool, tokens: list[int], salt: bytes = b"") -> Sequence:
    """A sequence whose tokens are all computed and registered."""
    one = sequence(tokens, salt)
    one.blocks = pool.take(-(-len(tokens) // SIZE))
    one.computed = one.settled = len(tokens)
    cache.register(one)
    return one


def made(enabled: bool = True) -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(16)
    return PrefixCache(pool, SIZE, enabled=enabled), pool


def test_finds_full_blocks_of_a_common_prefix() -> None:
    cache, pool = made()
    first = stored(cache, pool, list(range(10)))
    assert cache.look_up(sequence([*range(8), 40, 41])) == first.blocks[:2]
    assert cache.look_up(sequence([*range(7), 40, 41])) == first.blocks[:1]
    assert cache.look_up(sequence([9, *range(8)])) == []


def test_a_full_hit_leaves_a_block_to_compute() -> None:
    cache, pool = made()
    first = stored(cache, pool, list(range(8)))
    assert cache.look_up(sequence(list(range(8)))) == first.blocks[:1]
    assert cache.look_up(sequence([*range(8), 1])) == first.blocks


def test_tenants_do_not_share() -> None:
    cache, pool = made()
    stored(cache, pool, list(range(8)), b"one")
    assert cache.look_up(sequence(list(range(9)), b"two")) == []
    assert len(cache.look_up(sequence(list(range(9)), b"one"))) == 2


def test_prompt_logprobs_bypass_look_up_but_register() -> None:
    cache, pool = made()
    stored(cache, pool, list(range(8)))
    assert cache.look_up(sequence(list(range(9)), prompt_logprobs=True)) == []


def test_disabled_cache_always_misses() -> None:
    cache, pool = made(enabled=False)
    stored(cache, pool, list(range(8)))
    assert cache.look_up(sequence(list(range(9)))) == []
    assert len(cache) == 0


def test_generated_tokens_are_found_too() -> None:
    cache, pool = made()
    one = sequence([1, 2])
    one.blocks = pool.take(2)
    for token in (3, 4, 5, 6, 7, 8, 9):
        one.append(token)
    one.computed = one.settled = 8
    cache.register(one)
    assert cache.look_up(sequence([1, 2, 3, 4, 5, 6, 7, 8, 0])) == one.blocks


def test_evicted_and_forgotten_blocks_are_not_found() -> None:
    cache, pool = made()
    first = stored(cache, pool, list(range(8)))
    cache.forget(first.blocks[1:])
    assert cache.look_up(sequence(list(range(9)))) == first.blocks[:1]
    pool.release(first.blocks)
    pool.take(16)
    assert cache.look_up(sequence(list(range(9)))) == []
    assert len(cache) == 0


def test_equal_blocks_are_named_once() -> None:
    cache, pool = made()
    first = stored(cache, pool, list(range(8)))
    second = stored(cache, pool, list(range(8)))
    assert cache.look_up(sequence(list(range(9)))) == first.blocks
    pool.release(second.blocks)
    assert pool.evictable == 0


class Colliding(PrefixCache):
    """The worst hash there is."""

    def _digest(self, parent: bytes, contents: bytes) -> bytes:
        return b"same"


def test_colliding_names_give_no_wrong_hit() -> None:
    pool = BlockPool(16)
    cache = Colliding(pool, SIZE)
    first = stored(cache, pool, list(range(8)))
    other = stored(cache, pool, [9, 9, 9, 9, 4, 5, 6, 7])
    assert cache.look_up(sequence([9, 9, 9, 9, 4, 5, 6, 7, 0])) == []
    assert cache.look_up(sequence(list(range(9)))) == first.blocks[:1]
    assert len(cache) == 1
    assert other.registered > 2


def test_names_cannot_be_foreseen() -> None:
    names = []
    for _ in range(2):
        cache, pool = made()
        names.append(stored(cache, pool, list(range(8))).chain[1])
    assert names[0] != names[1]
