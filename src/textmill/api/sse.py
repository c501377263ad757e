"""Server-sent events over raw ASGI: one write per engine step, a comment when idle, a clear last word on errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Literal
from uuid import uuid4

from textmill.api.exchange import Exchange, Headers, encoder
from textmill.api.schema import ErrorResponse
from textmill.errors import IncompleteGeneration, TextmillError

KEEP_ALIVE = 15.0  # seconds of silence after which a comment shows that we are still there
DONE = b"data: [DONE]\n\n"
MARK = uuid4().hex  # occurs in no event
Style = Literal["native", "openai"]
HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def frame(value: object) -> bytes:
    """One event: `data:`, one space, JSON, a blank line."""
    return b"data: " + encoder.encode(value) + b"\n\n"


class Mould:
    """Events that differ in one string only: what stands around it is encoded once."""

    def __init__(self, event: Callable[[str], object]) -> None:
        self.before, self.after = frame(event(MARK)).split(encoder.encode(MARK))

    def frame(self, text: str) -> bytes:
        return self.before + encoder.encode(text) + self.after


class EventStream:
    """The answer as events. Entering sends the headers; leaving without an error ends the stream in its style."""

    def __init__(self, exchange: Exchange, style: Style, headers: Headers = ()) -> None:
        self.exchange = exchange
        self.style = style
        self.headers = [*HEADERS, *headers]
        self.last = monotonic()
        self.alive: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        await self.exchange.start(200, self.headers)
        self.exchange.ending = self.fail
        self.alive = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive is not None:
            self.alive.cancel()
        if error is None:
            await self.exchange.write(DONE if self.style == "openai" else b"", more=False)

    async def send(self, frames: bytes) -> None:
        """Write whole events. A slow client holds this back; what the engine sends meanwhile goes out together."""
        self.last = monotonic()
        await self.exchange.write(frames)

    def ready(self) -> bool:
        """True if `push` may be used: the client keeps up."""
        pipe = self.exchange.pipe
        return pipe is not None and pipe.ready

    def push(self, frames: bytes) -> None:
        """Write whole events at once, without waiting for anything; only while `ready`."""
        assert self.exchange.pipe is not None
        self.last = monotonic()
        self.exchange.pipe.write(frames)

    async def _keep_alive(self) -> None:
        while True:
            silence = monotonic() - self.last
            if silence < KEEP_ALIVE:
                await asyncio.sleep(KEEP_ALIVE - silence + 0.01)
                continue
            self.last = monotonic()
            await self.exchange.raw_send({"type": "http.response.body", "body": b":\n\n", "more_body": True})

    async def fail(self, error: TextmillError) -> None:
        """The last event of a stream that ends badly; the status is 200 already."""
        if self.style == "openai":
            last = frame({"error": {"message": error.message, "http_status_code": error.status}}) + DONE
        elif isinstance(error, IncompleteGeneration):
            last = frame(ErrorResponse("Incomplete generation stream", "incomplete_generation_stream"))
        else:
            last = frame(ErrorResponse(error.message, error.error_type))
        await self.exchange.write(last, more=False)
