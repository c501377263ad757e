"""The pool of KV block numbers: reference counts, free lists, and the order in which cached blocks are given up."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class IntegrityError(Exception):
    """The engine's own bookkeeping contradicts itself: a bug, never a user's fault."""


class BlockPool:
    """Every block is in one of three places: held (referenced), free and blank, or free but cached (evictable).

    Blank blocks are taken last-freed first, so that a light load touches little memory; cached ones only when no
    blank block is left, least recently used first. `on_evict` hears of each cached block that is given up.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.on_evict: Callable[[int], None] = lambda block: None
        self._references = [0] * total
        self._blank = list(range(total - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cached: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out now."""
        return len(self._blank) + len(self._evictable)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - self.available

    @property
    def evictable(self) -> int:
        """Free blocks whose contents are still cached."""
        return len(self._evictable)

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them would use up that much of `available`."""
        references = self._references
        return sum(1 for block in blocks if not references[block])

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks with one reference each; the caller has checked `available`."""
        if count > self.available:
            raise IntegrityError(f"{count} blocks wanted, {self.available} available")
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these cached blocks."""
        for block in blocks:
            if not self._references[block]:
                del self._evictable[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less, given in table order: the end of a chain is evicted before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._set_free(block)

    def keep(self, block: int) -> None:
        """The contents of a held block are worth finding again after its release."""
        self._cached.add(block)

    def forget(self, block: int) -> None:
        """The contents are worth nothing any more; an evictable block becomes blank."""
        self._cached.discard(block)
        if block in self._evictable:
            del self._evictable[block]
            self._blank.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise IntegrityError unless the block tables account for every reference and every block has one place."""
        held = Counter(block for table in tables for block in table)
        blank = set(self._blank)
        if len(blank) != len(self._blank):
            raise IntegrityError("a block is blank twice")
        for block in range(self.total):
            references = self._references[block]
            if references != held[block]:
                raise IntegrityError(f"block {block} counts {references} holders, {held[block]} hold it")
            places = (references > 0, block in blank, block in self._evictable)
            if sum(places) != 1 or (block in blank and block in self._cached):
                raise IntegrityError(f"block {block} is in places {places}")
            if block in self._evictable and block not in self._cached:
                raise IntegrityError(f"block {block} is evictable but not cached")

    def _set_free(self, block: int) -> None:
        if block in self._cached:
            self._evictable[block] = None
        else:
            self._blank.append(block)

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        self._cached.discard(block)
        self.on_evict(block)
        return block
