"""Which part of a model this process holds, and how parts become wholes again; one rank costs nothing.

Layers ask a group; models know nothing of it. `parallel.processes` makes groups of more than one.
"""

from __future__ import annotations

from typing import TypeVar

from textmill.errors import ConfigError, TextmillError

Value = TypeVar("Value")


class RankLost(TextmillError):
    """Another rank is gone or does not answer: nothing can be computed any more. Says what was noticed."""


class Group:
    """This process's place among `size` ranks. The default is alone: it holds everything and has nothing to add."""

    rank = 0
    size = 1

    def share(self, total: int, unit: int = 1) -> range:
        """The part of `total` things in a row that is ours; parts differ by at most one `unit`, if `unit` divides."""
        unit = 1 if total % unit else unit
        start, stop = (total // unit * place // self.size * unit for place in (self.rank, self.rank + 1))
        return range(start, stop)

    def even(self, total: int) -> range:
        """Our part where all parts must be alike; everything where they cannot be."""
        return range(total) if total % self.size else self.share(total)

    def heads(self, queries: int, keys: int) -> tuple[range, range]:
        """Our attention heads and the key/value heads they read, which ranks share where there are fewer of these.

        ConfigError where ranks would hold unlike numbers of heads, or parts of a key head's queries.
        """
        if queries % self.size or (keys % self.size and self.size % keys):
            raise ConfigError(
                f"{queries} attention heads with {keys} key/value heads cannot be split over {self.size} ranks; "
                f"--num-shard can be {', '.join(map(str, splits(queries, keys)))}"
            )
        shared = self.rank * keys // self.size
        return self.share(queries), range(shared, shared + 1) if keys < self.size else self.share(keys)

    def all_reduce(self, x: Value) -> Value:
        """The sum of all ranks' `x`; may use the memory of `x`."""
        return x

    def gather(self, x: Value) -> Value:
        """On rank 0 all ranks' columns side by side, [rows, columns] -> [rows, size x columns]; others keep theirs."""
        return x


def splits(queries: int, keys: int, largest: int = 64) -> list[int]:
    """The numbers of ranks over which so many heads divide."""
    return [n for n in range(1, largest + 1) if not queries % n and not (keys % n and n % keys)]


ALONE = Group()
