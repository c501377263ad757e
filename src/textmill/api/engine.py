"""What the web side needs of an engine, whoever stands behind it (`wire.client` does; tests have a scripted one)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from textmill.core import Emission, EngineInfo, Request

Take = Callable[[Emission], bool]
"""Is offered an emission the moment it is there; True: it is dealt with."""


class EngineHealth(Protocol):
    """Liveness by progress: `working` and an old step together mean that the engine hangs."""

    @property
    def step(self) -> int: ...
    @property
    def step_age_ns(self) -> int: ...
    @property
    def working(self) -> bool: ...
    @property
    def draining(self) -> bool: ...


class EngineClient(Protocol):
    """A connection to one engine. `generate` is an async generator that ends after an emission whose `finish` is set;
    closing it earlier cancels the request. While somebody waits for its next emission, `take` is offered it first, at
    once and without a switch of tasks; what `take` raises, the generator raises."""

    @property
    def connected(self) -> bool: ...

    async def info(self) -> EngineInfo: ...

    async def health(self) -> EngineHealth: ...

    async def stats(self) -> dict[str, float]: ...

    def generate(self, request: Request, take: Take | None = None) -> AsyncIterator[Emission]: ...
