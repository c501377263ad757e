"""What the web side needs of an engine, whoever stands behind it (`wire.client` does; tests have a scripted one)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from textmill.core import Emission, EngineInfo, Request


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
    closing it earlier cancels the request."""

    @property
    def connected(self) -> bool: ...

    async def info(self) -> EngineInfo: ...

    async def health(self) -> EngineHealth: ...

    async def stats(self) -> dict[str, float]: ...

    def generate(self, request: Request) -> AsyncIterator[Emission]: ...
