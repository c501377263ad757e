"""Blocks that nobody reads any more, where every layer looks back only so far: given back, and not asked for again.

A block stays with its sequence until all its tokens are settled: then the prefix cache knows it, no step in flight
writes it, and no draft that is taken back makes an earlier row read it.
"""

from __future__ import annotations

from collections.abc import Iterable

from textmill.engine.blocks import BlockPool
from textmill.engine.prefix import PrefixCache
from textmill.engine.sequence import Sequence


class Windows:
    """`reach`: no row reads keys so many or more tokens behind it (`core.RunnerLimits`); 0: rows read everything."""

    def __init__(self, pool: BlockPool, prefix: PrefixCache, block_size: int, reach: int) -> None:
        self._pool = pool
        self._prefix = prefix
        self._block_size = block_size
        self._reach = reach

    def leave(self, running: Iterable[Sequence]) -> None:
        """Give back what lies wholly behind every row that is still to come."""
        for sequence in running:
            first = self._first_read(sequence.settled)
            if first > sequence.left:
                self._pool.release(sequence.blocks[sequence.left : first])
                sequence.left = first

    def look_up(self, sequence: Sequence) -> tuple[int, list[int]]:
        """What the prefix cache has of a sequence: how many blocks at its beginning are not needed, then the hits."""
        if not self._reach:
            return 0, self._prefix.look_up(sequence)
        found = self._prefix.look_up_all(sequence)
        best = together = 0
        for end, block in enumerate(found, 1):
            together = 0 if block is None else together + 1
            if end - together <= self._first_read(end * self._block_size):
                best = end
        first = self._first_read(best * self._block_size)
        return first, [block for block in found[first:best] if block is not None]

    def needed(self, start: int, end: int, step: int) -> int:
        """The last of tokens [start, end) for which there must be blocks at the same time; `step`: tokens of a step."""
        return min(end, start + self._reach + 2 * step) if self._reach else end

    def _first_read(self, position: int) -> int:
        """The first block that a row at `position` reads, or one behind it."""
        return max(0, position - self._reach + 1) // self._block_size
