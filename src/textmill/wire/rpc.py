"""gRPC over `http2`: calls of a client and of a server, on a Unix socket; any gRPC implementation may be the peer.

Messages arrive by callback and leave at once, so that a message costs no switch of tasks or threads on either side.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from textmill.wire.hpack import Headers
from textmill.wire.http2 import Connection, Stream
from textmill.wire.names import MESSAGE_BYTES

PREFIX = struct.Struct(">BL")  # compressed or not, length
OK, UNKNOWN, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 2, 8, 12, 13, 14
CONTENT = (b"content-type", b"application/grpc")
BEGIN: Headers = [(b":status", b"200"), CONTENT]
LONGEST_PAUSE = 0.05  # seconds between looks whether the connections have ended

Taker = Callable[[bytes], None]
Handler = Callable[["Call"], None]


class RpcError(Exception):
    """A call that did not end well: gRPC's status, and in words."""

    def __init__(self, status: int, details: str) -> None:
        super().__init__(f"{details} (status {status})")
        self.status = status
        self.details = details


class Call:
    """One end of a call. `on_message` takes what arrives; `over` is done when the other end has said all it will.

    `begun` is done when the other end has answered at all; both bring the error, if there is one, as a result.
    """

    def __init__(self, stream: Stream, on_message: Taker = lambda data: None) -> None:
        loop = asyncio.get_running_loop()
        self.on_message = on_message
        self.begun: asyncio.Future[RpcError | None] = loop.create_future()
        self.over: asyncio.Future[RpcError | None] = loop.create_future()
        self._stream = stream
        self._begun_here = False
        self._parts = bytearray()
        self._status: RpcError | None = None
        stream.listener = self

    # Out

    @property
    def behind(self) -> bool:
        return self._stream.behind

    async def drained(self) -> None:
        """Wait until the other end keeps up, or is gone."""
        await self._stream.drained()

    def send(self, message: bytes) -> None:
        self._stream.send(PREFIX.pack(0, len(message)) + message)

    def ask(self, method: str) -> None:
        """A client's beginning."""
        path = (b":path", method.encode())
        pseudo = [(b":method", b"POST"), (b":scheme", b"http"), path, (b":authority", b"localhost")]
        self._stream.send_headers([*pseudo, (b"te", b"trailers"), CONTENT])

    def end(self) -> None:
        """A client's last word."""
        self._stream.send_end()

    def begin(self) -> None:
        """A server's: tells the client that the call has arrived."""
        self._begun_here = True
        self._stream.send_headers(BEGIN)

    def finish(self, status: int = OK, details: str = "") -> None:
        """A server's last word, behind all messages."""
        trailers = [] if self._begun_here else list(BEGIN)
        trailers.append((b"grpc-status", b"%d" % status))
        if details:
            trailers.append((b"grpc-message", quote(details).encode()))
        self._stream.send_headers(trailers, end=True)

    def cancel(self) -> None:
        self._stream.reset()

    def abort(self, why: str) -> None:
        """Cut it off from our side, as if the other end had gone."""
        self._stream.reset()
        self.ended(why)

    # In

    def headers(self, headers: Headers) -> None:
        found = dict(headers)
        status, http = found.get(b"grpc-status"), found.get(b":status", b"200")
        if status is not None and status != b"0":
            text = unquote_to_bytes(found.get(b"grpc-message", b"")).decode(errors="replace")
            self._status = RpcError(int(status) if status.isdigit() else UNKNOWN, text)
        elif http != b"200":
            self._status = RpcError(UNAVAILABLE, f"HTTP status {http.decode(errors='replace')}")
        if not self.begun.done():
            self.begun.set_result(self._status)

    def data(self, data: bytes) -> None:
        if not self._parts and len(data) >= PREFIX.size:
            packed, length = PREFIX.unpack_from(data)
            if not packed and len(data) == PREFIX.size + length:  # nearly always
                self.on_message(data[PREFIX.size :])
                return
        self._parts += data
        while len(self._parts) >= PREFIX.size and not self.over.done():
            packed, length = PREFIX.unpack_from(self._parts)
            if packed or length > MESSAGE_BYTES:
                self.abort("a compressed message" if packed else f"a message of {length} bytes")
            if self.over.done() or len(self._parts) < PREFIX.size + length:
                return
            message = bytes(memoryview(self._parts)[PREFIX.size : PREFIX.size + length])
            del self._parts[: PREFIX.size + length]
            self.on_message(message)

    def ended(self, error: str) -> None:
        found = self._status or (RpcError(UNAVAILABLE, error) if error else None)
        for future in (self.begun, self.over):
            if not future.done():
                future.set_result(found)


class Channel:
    """A client's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    async def to(cls, socket: Path) -> Channel:
        """Raises OSError."""
        _, connection = await asyncio.get_running_loop().create_unix_connection(Connection, str(socket))
        return cls(connection)

    def call(self, method: str, on_message: Taker) -> Call:
        """Begin a call; messages may be sent at once."""
        call = Call(self._connection.open(), on_message)
        call.ask(method)
        return call

    async def ask(self, method: str, message: bytes, timeout: float) -> bytes:
        """One message there, one back. Raises RpcError, TimeoutError."""
        replies: list[bytes] = []
        call = self.call(method, replies.append)
        call.send(message)
        call.end()
        try:
            async with asyncio.timeout(timeout):
                error = await call.over
        finally:
            call.cancel()
        if error is not None or not replies:
            raise error or RpcError(UNAVAILABLE, "no answer")
        return replies[0]

    def close(self) -> None:
        self._connection.close()


class Server:
    """A socket on which methods are called."""

    def __init__(self, methods: Mapping[str, Handler]) -> None:
        self._methods = {name.encode(): handler for name, handler in methods.items()}
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, socket: Path) -> None:
        self._server = await asyncio.get_running_loop().create_unix_server(self._connected, str(socket))

    async def stop(self, grace: float) -> None:
        """Take nothing new, let calls end for so many seconds, then close the connections."""
        if self._server is not None:
            self._server.close()
        deadline = asyncio.get_running_loop().time() + grace
        while any(one.streams for one in self._connections) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(LONGEST_PAUSE)
        for one in self._connections:
            one.close()
        if self._connections:
            await asyncio.wait([one.lost for one in self._connections], timeout=grace)

    def _connected(self) -> Connection:
        connection = Connection(self._called)
        self._connections.add(connection)
        connection.lost.add_done_callback(lambda _: self._connections.discard(connection))
        return connection

    def _called(self, stream: Stream, headers: Headers) -> None:
        call = Call(stream)
        handler = self._methods.get(dict(headers).get(b":path", b""))
        if handler is None:
            call.finish(UNIMPLEMENTED, "no such method")
        else:
            handler(call)


def unary(answer: Callable[[bytes], Awaitable[bytes]]) -> Handler:
    """A method that takes one message and brings one."""
    running: set[asyncio.Task[None]] = set()

    async def work(call: Call, message: bytes) -> None:
        try:
            reply = await answer(message)
        except Exception as error:  # noqa: BLE001 - fault boundary: the caller hears of it
            call.finish(INTERNAL, f"{type(error).__name__}: {error}")
            return
        call.begin()
        call.send(reply)
        call.finish()

    def take(call: Call, message: bytes) -> None:
        task = asyncio.get_running_loop().create_task(work(call, message))
        running.add(task)
        task.add_done_callback(running.discard)

    def handler(call: Call) -> None:
        call.on_message = lambda message: take(call, message)

    return handler
