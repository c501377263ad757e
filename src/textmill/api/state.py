"""All that one router's routes share; built once by the router (or a test), handed to `create_app`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from textmill.api.engine import EngineClient
from textmill.api.permits import Permits
from textmill.config import Settings
from textmill.core import EngineInfo
from textmill.errors import Draining, TextmillError, Unhealthy
from textmill.observe.router_metrics import RouterMetrics
from textmill.text.chat import ChatTemplate
from textmill.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from textmill.images.prompt import Sight


class Interruptible(Protocol):
    def interrupt(self, error: TextmillError) -> None: ...


@dataclass(slots=True)
class RouterState:
    """`model_name` is what clients read as the model's id. `peers` are the other routers' private sockets."""

    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    settings: Settings
    info: EngineInfo
    metrics: RouterMetrics
    permits: Permits
    compute_type: str = ""
    peers: tuple[str, ...] = ()
    draining: bool = False
    open: set[Interruptible] = field(default_factory=set)
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    pool: ThreadPoolExecutor | None = None
    sight: Sight | None = None  # of models that take images

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.eos_ids)

    @property
    def model_name(self) -> str:
        return self.info.model_id

    def refuse_if_down(self) -> None:
        """Raise what a client should hear while no request can be served at all."""
        if self.draining:
            raise Draining
        if not self.engine.connected:
            raise Unhealthy

    def threads(self) -> ThreadPoolExecutor:
        """The few threads that tokenize long texts (the tokenizer releases the GIL)."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.settings.validation_workers, thread_name_prefix="tokenize")
        return self.pool

    def interrupt_all(self, error: TextmillError) -> None:
        """End every open request now; each client reads `error` as its last words."""
        for one in list(self.open):
            one.interrupt(error)
