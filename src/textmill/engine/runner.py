"""The runner the engine needs: something that takes steps in order and brings their results back in order."""

from __future__ import annotations

from typing import Protocol

from textmill.core import RunnerLimits, Step, StepResult


class Runner(Protocol):
    """One model behind a slot table. Blocks are numbered 0 .. limits.num_blocks - 1, slots likewise.

    The engine relies on this. Steps run strictly in the order they were submitted, so a block or slot freed
    while step N runs may be used again by step N + 1. Releasing an empty slot does nothing, and an admission
    replaces whatever the slot held, so that a step that raised leaves no slot unusable. When `collect` raises, only
    the oldest uncollected step is lost and the next `collect` speaks of the next one; there, a row whose slot had
    a row in the lost step is void and must not raise (any answer will do, best `Sampled.error`). A step whose
    `submit` raised has changed nothing and is never collected.
    """

    @property
    def limits(self) -> RunnerLimits:
        """What the runner can hold; fixed after warm-up."""

    @property
    def alive(self) -> bool:
        """False once no later step can succeed; the engine then fails everything and stops."""

    @property
    def progress_ns(self) -> int:
        """When a long step last got on, by the monotonic clock; 0 where steps are short."""

    def submit(self, step: Step) -> None:
        """Start a step and return at once; it runs on the runner's own thread."""

    def collect(self) -> StepResult:
        """Wait for the oldest uncollected step; raises what the step raised."""

    def close(self) -> None:
        """Free everything; the last call."""
