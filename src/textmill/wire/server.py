"""The engine's side of the wire: one bidirectional stream per router, over a Unix socket.

The engine's thread hands over each step's emissions with one call into the event loop; a stream that is behind sends
several steps in one message, in order. A stream's end cancels everything that came through it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from google.protobuf.message import Message

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
from textmill.wire.names import SERVICE, SIZE_OPTIONS, address

log = logging.getLogger(__name__)

ROWS_PER_MESSAGE = 8192  # of a stream that is far behind

if TYPE_CHECKING:  # only the stubs know these as generic types
    Context = grpc.aio.ServicerContext[pb.RouterMessage, pb.StepBatch]
    MethodHandler = grpc.RpcMethodHandler[Message, Message]


class RouterStream:
    """One router's requests: its ids on one side, the engine's tickets on the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[int, int] = {}
        self._pending: list[Emission] = []
        self.send_seconds = 0.0
        self._step = 0
        self._ready = asyncio.Event()
        self._ended = False

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

    async def batches(self) -> AsyncIterator[pb.StepBatch]:
        """Messages to send, until the stream is ended and everything is sent."""
        while self._pending or not self._ended:
            await self._ready.wait()
            pending, self._pending = self._pending[:ROWS_PER_MESSAGE], self._pending[ROWS_PER_MESSAGE:]
            if pending:
                started = time.thread_time()
                yield batch_from_emissions(self._step, pending)
                self.send_seconds += time.thread_time() - started
            if not self._pending and not self._ended:
                self._ready.clear()

    def end(self) -> None:
        """Nothing more will come; `batches` ends when it has sent what is there."""
        self._ended = True
        self._ready.set()

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
        self._ready.set()


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

    async def serve(self, messages: AsyncIterator[pb.RouterMessage], context: Context) -> None:
        await context.send_initial_metadata(())  # tells the router that it is connected
        stream = RouterStream(self._engine)
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(stream, messages))
        try:
            async for batch in stream.batches():
                await context.write(batch)
        finally:
            self._streams.discard(stream)
            self._send_seconds += stream.send_seconds
            stream.cancel_all()
            reader.cancel()
            await asyncio.wait([reader])
            if not reader.cancelled() and (error := reader.exception()):
                log.warning("a router's stream broke: %r", error)

    async def _read(self, stream: RouterStream, messages: AsyncIterator[pb.RouterMessage]) -> None:
        try:
            async for message in messages:
                stream.take(message)
        finally:
            stream.cancel_all()  # the router is gone or has said its last word
            stream.end()

    async def info(self, request: pb.InfoRequest, context: object) -> pb.InfoReply:
        return self._info

    async def health(self, request: pb.HealthRequest, context: object) -> pb.HealthReply:
        return reply_from_health(self._engine.health())

    async def stats(self, request: pb.StatsRequest, context: object) -> pb.StatsReply:
        sent = self._send_seconds + sum(stream.send_seconds for stream in self._streams)
        return reply_from_stats(self._engine.stats() | {"send_seconds": sent})

    def handler(self) -> grpc.GenericRpcHandler[Message, Message]:
        def unary(method: Callable[..., object], request: type[Message], reply: type[Message]) -> MethodHandler:
            return grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=request.FromString,
                response_serializer=reply.SerializeToString,
            )

        methods: dict[str, MethodHandler] = {
            "Serve": grpc.stream_stream_rpc_method_handler(
                self.serve,
                request_deserializer=pb.RouterMessage.FromString,
                response_serializer=pb.StepBatch.SerializeToString,
            ),
            "Info": unary(self.info, pb.InfoRequest, pb.InfoReply),
            "Health": unary(self.health, pb.HealthRequest, pb.HealthReply),
            "Stats": unary(self.stats, pb.StatsRequest, pb.StatsReply),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


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


async def _listen(service: EngineService, socket: Path) -> grpc.aio.Server:
    socket.unlink(missing_ok=True)
    server = grpc.aio.server(options=SIZE_OPTIONS)
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_insecure_port(address(socket))
    await server.start()
    socket.chmod(0o600)
    return server


async def _shut_down(engine: Engine, service: EngineService, server: grpc.aio.Server, socket: Path) -> None:
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
