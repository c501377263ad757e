"""The engine's side of the wire: one bidirectional stream per router, over a Unix socket.

The engine's thread hands over each step's emissions with one call into the event loop; a stream that is behind sends
several steps in one message, in order. A stream's end cancels everything that came through it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from textmill.core import Emission, EngineInfo, Finish
from textmill.engine.engine import Engine
from textmill.errors import TextmillError
from textmill.wire import engine_pb2 as pb
from textmill.wire.convert import (
    batch_from_emissions,
    reply_from_health,
    reply_from_info,
    reply_from_stats,
    request_from_submit,
)
from textmill.wire.names import method
from textmill.wire.rpc import Call, Handler, Server, unary

log = logging.getLogger(__name__)

ROWS_PER_MESSAGE = 8192  # of a stream that is far behind


class RouterStream:
    """One router's requests: its ids on one side, the engine's tickets on the other.

    A step's tokens go out in the callback that brings them, unless the router is behind; then a task waits for it.
    """

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[int, int] = {}
        self._pending: list[Emission] = []
        self.send_seconds = 0.0
        self._step = 0
        self._waiting: asyncio.Task[None] | None = None
        self._ended = False

    def receive(self, message: bytes) -> None:
        """A router's message, in its bytes."""
        try:
            self.take(pb.RouterMessage.FromString(message))
        except Exception as error:  # noqa: BLE001 - fault boundary: it ends this router's stream, and no other
            log.warning("a router's stream broke: %r", error)
            self._call.abort("the router's message makes no sense")

    def take(self, message: pb.RouterMessage) -> None:
        """Let in what a router sent; cancellations of unknown ids mean nothing (they crossed the last token)."""
        for submit in message.submits:
            if submit.id in self._tickets:
                error = f"the id {submit.id} is in use"
                self._queue(self._step, [Emission(submit.id, finish=Finish.FAILED, error=error)])
            else:
                self._tickets[submit.id] = self._engine.submit(request_from_submit(submit), self.deliver)
        for id_ in message.cancels:
            if id_ in self._tickets:
                self._engine.cancel(self._tickets[id_])

    def deliver(self, step: int, emissions: list[Emission]) -> None:
        """The engine's sink; on the engine's thread."""
        self._loop.call_soon_threadsafe(self._arrived, step, emissions)

    def end(self) -> None:
        """Nothing more will come; the stream ends when what is there has been sent."""
        self._ended = True
        self._send()

    def cancel_all(self) -> None:
        for ticket in self._tickets.values():
            self._engine.cancel(ticket)

    def _arrived(self, step: int, emissions: list[Emission]) -> None:
        for emission in emissions:
            if emission.finish:
                self._tickets.pop(emission.request_id, None)
        self._queue(step, emissions)

    def _queue(self, step: int, emissions: list[Emission]) -> None:
        self._step = step
        self._pending += emissions
        self._send()

    def _send(self) -> None:
        """Send what is there, as far as the router keeps up."""
        if self._waiting is not None:
            return
        started = time.thread_time()
        while self._pending and not self._call.behind:
            pending, self._pending = self._pending[:ROWS_PER_MESSAGE], self._pending[ROWS_PER_MESSAGE:]
            self._call.send(batch_from_emissions(self._step, pending).SerializeToString())
        self.send_seconds += time.thread_time() - started
        if self._pending:
            self._waiting = self._loop.create_task(self._send_later())
        elif self._ended:
            self._call.finish()

    async def _send_later(self) -> None:
        await self._call.drained()
        self._waiting = None
        if self._call.over.done():
            self._pending.clear()
        self._send()


class EngineService:
    """The four methods of `engine.proto`."""

    def __init__(self, engine: Engine, info: EngineInfo) -> None:
        self._engine = engine
        self._info = reply_from_info(info)
        self._streams: set[RouterStream] = set()
        self._send_seconds = 0.0  # of streams that have ended

    def end_streams(self) -> None:
        """Let every stream send what it has and close."""
        for stream in tuple(self._streams):
            stream.end()

    def serve(self, call: Call) -> None:
        """A router's stream begins."""
        call.begin()  # tells the router that it is connected
        stream = RouterStream(self._engine, call)
        self._streams.add(stream)
        call.on_message = stream.receive
        call.over.add_done_callback(lambda _: self._left(stream))

    def _left(self, stream: RouterStream) -> None:
        """The router is gone or has said its last word."""
        self._streams.discard(stream)
        self._send_seconds += stream.send_seconds
        stream.cancel_all()
        stream.end()

    async def info(self, request: bytes) -> bytes:
        return self._info.SerializeToString()

    async def health(self, request: bytes) -> bytes:
        return reply_from_health(self._engine.health()).SerializeToString()

    async def stats(self, request: bytes) -> bytes:
        sent = self._send_seconds + sum(stream.send_seconds for stream in self._streams)
        return reply_from_stats(self._engine.stats() | {"send_seconds": sent}).SerializeToString()

    def methods(self) -> dict[str, Handler]:
        return {
            method("Serve"): self.serve,
            method("Info"): unary(self.info),
            method("Health"): unary(self.health),
            method("Stats"): unary(self.stats),
        }


async def run_engine_server(
    engine: Engine,
    info: EngineInfo,
    socket: Path,
    on_ready: Callable[[], None],
    stop: asyncio.Event,
    *,
    drain_seconds: float = 90.0,
) -> None:
    """Serve until `stop` is set, then finish what is live within `drain_seconds` and fail the rest.

    Starts the engine and stops it. Raises TextmillError if the engine failed by itself. The socket is gone afterwards.
    """
    died = asyncio.Event()
    loop = asyncio.get_running_loop()
    engine.on_failure = lambda text: _tell(loop, died)
    service = EngineService(engine, info)
    server = await _listen(service, socket)
    engine.start()
    try:
        on_ready()
        await _first(stop, died)
        engine.drain()
        await _idle(engine, died, drain_seconds)
    finally:
        await asyncio.shield(_shut_down(engine, service, server, socket))
    if engine.failure:
        raise TextmillError(engine.failure)


async def _listen(service: EngineService, socket: Path) -> Server:
    socket.unlink(missing_ok=True)
    server = Server(service.methods())
    await server.start(socket)
    socket.chmod(0o600)
    return server


async def _shut_down(engine: Engine, service: EngineService, server: Server, socket: Path) -> None:
    await asyncio.to_thread(engine.stop)  # fails what is still live: its last emissions are on their way
    await asyncio.sleep(0)
    service.end_streams()
    await server.stop(grace=1.0)
    socket.unlink(missing_ok=True)


async def _idle(engine: Engine, died: asyncio.Event, seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while engine.health().working and not died.is_set():
        if asyncio.get_running_loop().time() > deadline:
            log.warning("requests still running after %.0f s of draining are ended", seconds)
            return
        await asyncio.sleep(0.01)


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
