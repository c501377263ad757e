"""A step from its planning until its result is digested."""

from __future__ import annotations

from dataclasses import dataclass, field

from textmill.core import Admission, SlotWork
from textmill.engine.sequence import Sequence


@dataclass(slots=True)
class Row:
    """One row of a step in flight; `residency` tells whether its sequence is still in the same stay."""

    sequence: Sequence
    residency: int
    work: SlotWork


@dataclass(slots=True)
class Plan:
    """A step while it is being made, and then until its result is there. `decode_tokens`: those of no prompt."""

    number: int
    rows: list[Row] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    blocks: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    tokens: int = 0
    decode_tokens: int = 0
    prefill: bool = False
    preempted: bool = False
    launched_ns: int = 0
