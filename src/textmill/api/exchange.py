"""One HTTP request and its answer as raw ASGI messages: body limits, plain answers, a watch on the client."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

import msgspec

from textmill.api.decoding import Refusal
from textmill.api.schema import ErrorResponse
from textmill.api.state import RouterState
from textmill.errors import TextmillError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Handler = Callable[["Exchange"], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]
Ending = Callable[[TextmillError], Awaitable[None]]

SEND_LIMIT = 30.0  # seconds a client may leave our bytes unread
LINGER = 2.0  # seconds in which a refused upload is read and thrown away, so that its sender sees the answer
ABORT = "textmill.abort"  # ASGI extension of our server: cut the connection without flushing
PIPE = "textmill.pipe"  # and another: a `Pipe`
TOO_LARGE = "Failed to buffer the request body: length limit exceeded"
NO_JSON = "Expected request with `Content-Type: application/json`"
logger = logging.getLogger("textmill.router")
encoder = msgspec.json.Encoder()


class Pipe(Protocol):
    """The body of an answer that has begun, without ASGI's messages."""

    @property
    def ready(self) -> bool:
        """True if the client keeps up, so that a write takes nobody's patience."""

    def write(self, data: bytes) -> None:
        """One more part of the body; only while `ready`."""


class SlowReader(Exception):
    """The client has left our bytes unread for too long."""


class Exchange:
    """One request on its way. Handlers read the body once, then answer once, or open an event stream."""

    def __init__(self, state: RouterState, scope: Scope, receive: Receive, send: Send) -> None:
        self.state = state
        self.scope = scope
        self.receive = receive
        self.raw_send = send
        self.pipe: Pipe | None = scope.get("extensions", {}).get(PIPE)
        self.started = False
        self.ended = False
        self.ending: Ending | None = None  # how an open event stream tells its client of an error
        self.interruption: TextmillError | None = None
        self.work: asyncio.Task[None] | None = None

    @property
    def route(self) -> str:
        path: str = self.scope["path"]
        return path

    def header(self, name: bytes) -> bytes | None:
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return None

    def bearer(self) -> bytes:
        """The key that the client presents; empty without one."""
        scheme, _, key = (self.header(b"authorization") or b"").partition(b" ")
        return key.strip() if scheme.lower() == b"bearer" else b""

    def cache_salt(self) -> bytes:
        """Separates prefix-cache tenants: equal keys may share blocks, and no key is a tenant of its own."""
        key = self.bearer()
        return hashlib.blake2b(key, digest_size=16).digest() if key else b""

    # -- reading

    async def body(self) -> bytes:
        """The JSON body, refused as soon as it is known to be too large."""
        self._check_json()
        limit = self.state.settings.payload_limit
        declared = self.header(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise Refusal(413, TOO_LARGE)
        parts, size = [], 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise Refusal(413, TOO_LARGE)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_json(self) -> None:
        if self.header(b"content-encoding") not in (None, b"identity"):
            raise Refusal(415, "Compressed request bodies are not supported")
        kind = (self.header(b"content-type") or b"").split(b";")[0].strip().lower()
        if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
            raise Refusal(415, NO_JSON)

    # -- answering

    async def send(self, message: Message) -> None:
        """Hand a message to the server; raises `SlowReader` when the client does not take what it was sent."""
        try:
            async with asyncio.timeout(SEND_LIMIT):
                await self.raw_send(message)
        except TimeoutError:
            raise SlowReader from None

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def write(self, data: bytes, more: bool = True) -> None:
        self.ended = not more
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, status: int, body: bytes, kind: bytes = b"application/json", headers: Headers = ()) -> None:
        length = str(len(body)).encode()
        await self.start(status, [(b"content-type", kind), (b"content-length", length), *headers])
        await self.write(body, more=False)

    async def json(self, value: object, status: int = 200, headers: Headers = ()) -> None:
        await self.answer(status, encoder.encode(value), headers=headers)

    async def empty(self, status: int, headers: Headers = ()) -> None:
        await self.start(status, [(b"content-length", b"0"), *headers])
        await self.write(b"", more=False)

    async def refuse(self, refusal: Refusal) -> None:
        if refusal.status == 413:
            await self._refuse_upload(refusal)
        elif refusal.text:
            kind = b"text/plain; charset=utf-8"
            await self.answer(refusal.status, refusal.text.encode(), kind, refusal.headers)
        else:
            await self.empty(refusal.status, refusal.headers)

    async def _refuse_upload(self, refusal: Refusal) -> None:
        """Answer at once, then throw away what still arrives: closing on unread bytes would destroy the answer."""
        body = refusal.text.encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await self.start(refusal.status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.write(body)
        try:
            async with asyncio.timeout(LINGER):
                while (message := await self.receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await self.write(b"", more=False)

    async def fail(self, error: TextmillError) -> None:
        """Tell the client in the form that it can still read: a status, or the last event of its stream."""
        if self.ended:
            return
        if self.ending is not None:
            await self.ending(error)
        elif not self.started:
            headers = [(b"retry-after", b"1")] if error.status in (429, 503) else []
            await self.json(ErrorResponse(error.message, error.error_type), error.status, headers)

    # -- running

    async def run(self, handler: Handler) -> None:
        """Run the handler until it is done, the client leaves, or the server ends it."""
        self.state.open.add(self)
        self.work = asyncio.current_task()
        try:
            await self._answered(handler)
        except SlowReader:
            await self._cut()
        finally:
            self.state.open.discard(self)

    async def _answered(self, handler: Handler) -> None:
        try:
            await self._guarded(handler)
        except Refusal as refusal:
            await self.refuse(refusal)
        except TextmillError as error:
            await self.fail(error)
        except asyncio.CancelledError:
            if self.interruption is not None:  # else the client has left: there is nobody to answer
                await self.fail(self.interruption)

    async def _guarded(self, handler: Handler) -> None:
        """The fault boundary: what we did not foresee goes to the log, and the client learns only that it happened."""
        try:
            await handler(self)
        except (Refusal, TextmillError, SlowReader):
            raise
        except Exception:  # fault boundary: one request can never end the router
            logger.exception("request failed", extra={"route": self.route})
            raise TextmillError("Internal server error") from None

    def interrupt(self, error: TextmillError) -> None:
        if self.work is not None and not self.work.done():
            self.interruption = error
            self.work.cancel()

    async def _cut(self) -> None:
        abort = self.scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()
            await asyncio.sleep(0)  # lets the server see that the connection is gone


class ClientWatch:
    """Cancels the work on a request when its client leaves. Use after the body is read, as a context manager."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        worker = asyncio.current_task()
        if worker is not None:
            self.task = asyncio.create_task(self._watch(worker))

    async def _watch(self, worker: asyncio.Task[Any]) -> None:
        while (await self.exchange.receive())["type"] != "http.disconnect":
            pass
        if not self.exchange.ended:
            worker.cancel()

    async def __aexit__(self, *_: object) -> None:
        if self.task is not None:
            self.task.cancel()
