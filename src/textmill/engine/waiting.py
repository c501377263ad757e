"""The waiting line: first come, first served; the preempted go back to its head; anybody can leave in O(1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from textmill.engine.sequence import Sequence


class WaitingLine:
    def __init__(self) -> None:
        self._line: OrderedDict[int, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line.values())

    @property
    def head(self) -> Sequence:
        return next(iter(self._line.values()))

    def join(self, sequence: Sequence) -> None:
        self._line[sequence.number] = sequence

    def return_to_head(self, sequence: Sequence) -> None:
        self._line[sequence.number] = sequence
        self._line.move_to_end(sequence.number, last=False)

    def leave(self, sequence: Sequence) -> None:
        del self._line[sequence.number]
