"""The router's side of the wire: requests go in, emissions come out, and a broken engine ends nothing silently.

One stream carries all requests of this process. When it breaks, every open request fails at once, and the client
goes on trying to connect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc.aio
from google.protobuf.message import Message

from textmill.core import Emission, EngineInfo, Request
from textmill.engine.stats import Health
from textmill.errors import GenerationFailed, Unhealthy
from textmill.wire import engine_pb2 as pb
from textmill.wire.convert import (
    emissions_from_batch,
    health_from_reply,
    info_from_reply,
    stats_from_reply,
    submit_from_request,
)
from textmill.wire.names import SERVICE, SIZE_OPTIONS, address

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # only the stubs know these as generic types
    ServeMethod = grpc.aio.StreamStreamMultiCallable[pb.RouterMessage, pb.StepBatch]
    Stream = grpc.aio.StreamStreamCall[pb.RouterMessage, pb.StepBatch]
Reply = TypeVar("Reply", bound=Message)
Take = Callable[[Emission], bool]
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
TOKENS_PER_MESSAGE = 2_000_000  # at most 5 bytes each: well under the message limit
PIXEL_BYTES_PER_TOKEN = 4  # of pictures, which count among the tokens


class Inbox:
    """What has come for one request. While somebody waits for it, `take` is offered each emission first."""

    def __init__(self, take: Take | None) -> None:
        self._take = take
        self._items: deque[Emission | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Emission | Exception) -> None:
        if self._take is not None and self._waiter is not None and not self._items and isinstance(item, Emission):
            try:
                if self._take(item):
                    return
            except Exception as error:  # noqa: BLE001 - fault boundary: it fails its own request, and no other
                item = error
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Emission:
        """The next emission; raises what was put in its place."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


class EngineClient:
    """Talks to one engine. All methods belong to the event loop that `connect` ran on."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel: grpc.aio.Channel | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._submits: deque[pb.Submit] = deque()
        self._cancels: list[int] = []
        self._outgoing = asyncio.Event()
        self._linked = asyncio.Event()
        self._last_id = 0
        self.on_received: Callable[[float], None] = lambda seconds: None  # hears what each message took to take in
        self._keeper: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._linked.is_set()

    async def connect(self, timeout: float = 30.0) -> None:
        """Begin to connect, and to reconnect for ever after; raises Unhealthy if the first link takes too long."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_connected())
        try:
            await asyncio.wait_for(self._linked.wait(), timeout)
        except TimeoutError:
            await self.close()
            raise Unhealthy(f"no engine answers at {self._socket}") from None

    async def close(self) -> None:
        """End the stream; open requests fail here and are cancelled there."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None

    async def info(self) -> EngineInfo:
        return info_from_reply(await self._ask("Info", pb.InfoRequest(), pb.InfoReply))

    async def health(self) -> Health:
        return health_from_reply(await self._ask("Health", pb.HealthRequest(), pb.HealthReply))

    async def stats(self) -> dict[str, float]:
        return stats_from_reply(await self._ask("Stats", pb.StatsRequest(), pb.StatsReply))

    async def generate(self, request: Request, take: Take | None = None) -> AsyncGenerator[Emission, None]:
        """Emissions of one request, the last one with a finish; leaving early cancels it at the engine.

        While the generator waits, `take` is offered each emission first; one that it takes does not come out here.
        `request.id` is ignored. A request that fails alone ends with a `Finish.FAILED` emission. Raises Unhealthy if
        there is no engine to submit to, GenerationFailed if the engine is lost on the way.
        """
        if not self.connected:
            raise Unhealthy("the engine is not connected")
        self._last_id += 1
        id_ = self._last_id
        self._submits.append(submit_from_request(replace(request, id=id_)))
        inbox = self._inboxes[id_] = Inbox(take)
        self._outgoing.set()
        try:
            while True:
                item = await inbox.get()
                yield item
                if item.finish:
                    return
        finally:
            self._leave(id_)

    # Requests

    def _leave(self, id_: int) -> None:
        """Forget a request; the engine must hear of it unless it sent the last emission itself."""
        if self._inboxes.pop(id_, None) is not None:
            self._cancels.append(id_)
            self._outgoing.set()

    def _dispatch(self, batch: pb.StepBatch) -> None:
        started = time.thread_time()
        emissions = emissions_from_batch(batch)
        self.on_received(time.thread_time() - started)
        for emission in emissions:
            inbox = self._inboxes.get(emission.request_id)
            if inbox is None:
                continue  # left before this came
            if emission.finish:
                del self._inboxes[emission.request_id]
            inbox.put(emission)

    def _fail_all(self, text: str) -> None:
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            inbox.put(GenerationFailed(text))

    # The stream

    async def _keep_connected(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await self._hold_link()
                pause = FIRST_PAUSE
            except grpc.aio.AioRpcError as error:
                log.debug("the engine does not answer: %s", error.details())
            except Exception:  # fault boundary: whatever broke this link, the next one is tried
                log.exception("the link to the engine broke")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _hold_link(self) -> None:
        """Connect, and carry messages until the stream ends; raises AioRpcError if it never began."""
        options = (*SIZE_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(address(self._socket), options=options) as channel:
            method: ServeMethod = channel.stream_stream(
                f"/{SERVICE}/Serve",
                request_serializer=pb.RouterMessage.SerializeToString,
                response_deserializer=pb.StepBatch.FromString,
            )
            stream: Stream = method()  # type: ignore[call-arg]  # the stubs want an iterator; there is none
            await stream.wait_for_connection()
            self._begin(channel)
            try:
                await self._carry(stream)
            finally:
                self._end()

    def _begin(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._submits.clear()
        self._cancels.clear()
        self._linked.set()

    def _end(self) -> None:
        self._linked.clear()
        self._channel = None
        self._fail_all("the engine stopped before the request was finished")

    async def _carry(self, stream: Stream) -> None:
        writer = asyncio.create_task(self._write(stream))
        try:
            async for batch in stream:
                self._dispatch(batch)
        except grpc.aio.AioRpcError as error:
            log.warning("the engine's stream broke: %s", error.details())
        finally:
            writer.cancel()
            await asyncio.wait([writer])

    async def _write(self, stream: Stream) -> None:
        """Everything that gathered while the last message went out is the next message."""
        while True:
            await self._outgoing.wait()
            self._outgoing.clear()
            while self._submits or self._cancels:
                try:
                    await stream.write(self._next_message())
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the reader hears of it too

    def _next_message(self) -> pb.RouterMessage:
        message, tokens = pb.RouterMessage(), 0
        while self._submits and tokens < TOKENS_PER_MESSAGE:
            submit = self._submits.popleft()
            tokens += weight(submit)
            message.submits.append(submit)
        if not self._submits:  # a cancellation must not overtake its request
            message.cancels.extend(self._cancels)
            self._cancels.clear()
        return message

    async def _ask(self, method: str, request: Message, reply: type[Reply]) -> Reply:
        if self._channel is None:
            raise Unhealthy("the engine is not connected")
        call: grpc.aio.UnaryUnaryMultiCallable[Message, Reply] = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            return await call(request, timeout=10.0)
        except grpc.aio.AioRpcError as error:
            raise Unhealthy(f"the engine does not answer: {error.details()}") from error


def weight(submit: pb.Submit) -> int:
    """How much of a message a request takes, in tokens."""
    pixels = sum(len(image.pixels) for image in submit.images) if submit.images else 0
    return len(submit.tokens) + len(submit.encoder_tokens) + pixels // PIXEL_BYTES_PER_TOKEN
