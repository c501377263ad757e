"""The prefix cache: finds blocks that already hold the keys and values of a sequence's first tokens.

A block is named by a keyed digest of its own tokens (and of the pictures that some of them stand for) and its
predecessor's name, with the tenant's salt at the root, so a name stands for a whole prefix of one tenant. The key is
drawn at start: names cannot be made up outside.
Tokens and the predecessor's name are compared on every hit, so a collision of digests is a miss, never a wrong hit.
"""

from __future__ import annotations

import secrets
from array import array
from dataclasses import dataclass
from hashlib import blake2b

from textmill.core import Image, Request
from textmill.engine.blocks import BlockPool
from textmill.engine.sequence import Sequence

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Entry:
    name: bytes
    parent: bytes
    tokens: tuple[int, ...]
    block: int


class PrefixCache:
    """Names for full blocks. The pool decides how long a free block lives; `enabled=False` makes every look-up miss."""

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool = True) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled
        self._key = secrets.token_bytes(32)
        self._by_name: dict[bytes, Entry] = {}
        self._by_block: dict[int, Entry] = {}
        pool.on_evict = self._evicted

    def __len__(self) -> int:
        return len(self._by_name)

    def look_up(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the longest known prefix, leaving at least one token to compute; nobody holds them yet."""
        if not self._enabled or sequence.wants_prompt_logprobs:
            return []
        hits: list[int] = []
        for index in range((len(sequence.tokens) - 1) // self._block_size):
            entry = self._find(sequence, index)
            if entry is None:
                break
            hits.append(entry.block)
        return hits

    def look_up_all(self, sequence: Sequence) -> list[int | None]:
        """For every full block of the sequence but one with its last token: what holds the same, if anything does."""
        if not self._enabled or sequence.wants_prompt_logprobs:
            return []
        entries = [self._find(sequence, index) for index in range((len(sequence.tokens) - 1) // self._block_size)]
        return [None if entry is None else entry.block for entry in entries]

    def register(self, sequence: Sequence) -> None:
        """Name every block of the sequence that is full, known and stored, as far as that is new."""
        full = sequence.settled // self._block_size
        if not self._enabled or sequence.registered >= full:
            return
        for index in range(sequence.registered, full):
            if not self._register_block(sequence, index):
                sequence.registered = sequence.limit  # a collision: nothing behind it can be named
                return
        sequence.registered = full

    def forget(self, blocks: list[int]) -> None:
        """These blocks may hold wrong values (their step failed): never find them again."""
        for block in blocks:
            entry = self._by_block.pop(block, None)
            if entry is not None:
                del self._by_name[entry.name]
                self._pool.forget(block)

    def _register_block(self, sequence: Sequence, index: int) -> bool:
        """False if the name is taken by different tokens. An equal block that is named already stays the named one."""
        parent, name, tokens = self._name(sequence, index)
        entry = self._by_name.get(name)
        if entry is not None:
            return entry.parent == parent and entry.tokens == tokens
        block = sequence.blocks[index]
        self._by_name[name] = self._by_block[block] = Entry(name, parent, tokens, block)
        self._pool.keep(block)
        return True

    def _find(self, sequence: Sequence, index: int) -> Entry | None:
        parent, name, tokens = self._name(sequence, index)
        entry = self._by_name.get(name)
        if entry is None or entry.tokens != tokens or entry.parent != parent:
            return None
        return entry

    def _name(self, sequence: Sequence, index: int) -> tuple[bytes, bytes, tuple[int, ...]]:
        """The parent's name, the name and the tokens of a full block; digests are remembered by the sequence."""
        chain = sequence.chain
        if not chain:
            chain.append(self._root(sequence.request))
        start = index * self._block_size
        tokens = tuple(sequence.tokens[start : start + self._block_size])
        if len(chain) == index + 1:
            contents = array("I", tokens).tobytes()
            if sequence.request.images:
                contents += pictures_between(sequence.request.images, start, start + self._block_size)
            chain.append(self._digest(chain[index], contents))
        return chain[index], chain[index + 1], tokens

    def _root(self, request: Request) -> bytes:
        """What all depends on beside the tokens: the tenant, and what an encoder read."""
        root = self._digest(b"salt", request.cache_salt)
        return self._digest(root, array("I", request.encoder_tokens).tobytes()) if request.encoder_tokens else root

    def _digest(self, parent: bytes, contents: bytes) -> bytes:
        return blake2b(parent + contents, digest_size=DIGEST_BYTES, key=self._key).digest()

    def _evicted(self, block: int) -> None:
        del self._by_name[self._by_block.pop(block).name]


def pictures_between(images: tuple[Image, ...], start: int, end: int) -> bytes:
    """Which parts of which pictures the tokens start .. end stand for; empty if none."""
    here = [one for one in images if one.start < end and one.start + one.count > start]
    return b"".join(b"image" + array("q", (one.start - start, one.count)).tobytes() + one.digest for one in here)
