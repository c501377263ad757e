"""HTTP/2 (RFC 9113) over one private socket, as much as gRPC needs of it: frames, windows, headers, data of streams.

Peers may be any implementation. What we receive is never held back: our windows are as wide as they can be, and
who listens takes everything at once. What we send keeps to the peer's windows.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Protocol, cast

from textmill.wire.hpack import BadHeaders, Decoder, Headers, written

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = struct.Struct(">BHBBL")  # length (high byte and the rest), kind, flags, stream
PAIR = struct.Struct(">HL")  # one setting
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20
INITIAL_WINDOW, MAX_FRAME = 4, 5  # settings
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, CANCEL = 0x0, 0x1, 0x3, 0x8  # reasons to end something
DEFAULT_WINDOW = 65_535
WIDEST = (1 << 31) - 1
TOP_UP = 1 << 29  # bytes after which a window is widened again
FRAME_BYTES = 16_384  # what a peer may put into a frame
BLOCK_BYTES = 1 << 16  # of headers


class Broken(Exception):
    """The peer does what the protocol forbids."""

    def __init__(self, text: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(text)
        self.code = code


class Listener(Protocol):
    """Hears what arrives on a stream."""

    def headers(self, headers: Headers) -> None: ...

    def data(self, data: bytes) -> None: ...

    def ended(self, error: str) -> None:
        """The peer has said its last word; `error`: the stream is gone, and why. Comes once."""


class Stream:
    """One request and its answer."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.number = number
        self.listener: Listener | None = None
        self.window = connection.stream_window  # what the peer lets us send
        self.received = 0  # since our window was widened
        self.ended_here = self.ended_there = False
        self._connection = connection
        self._unsent = bytearray()
        self._last: Headers | None = None  # the headers after the data

    @property
    def behind(self) -> bool:
        """True while the peer does not keep up: what is sent now has to wait."""
        return bool(self._unsent) or self._connection.paused

    async def drained(self) -> None:
        """Wait until it keeps up again, or the stream is gone."""
        while self.behind and not self.ended_here:
            await self._connection.progress()

    def send_headers(self, headers: Headers, end: bool = False) -> None:
        """Headers, or with `end` a server's trailers; these leave when the data has left."""
        if self.ended_here:
            return
        if self._unsent:
            self._last = headers
            return
        flags = END_HEADERS | END_STREAM if end else END_HEADERS
        self._connection.write(frame(HEADERS, flags, self.number, written(headers)))
        if end:
            if not self.ended_there:  # nobody reads what the peer may still send
                self._connection.write(reset(self.number, NO_ERROR))
                self.ended_there = True
            self._end()

    def send(self, data: bytes) -> None:
        if self.ended_here:
            return
        size, connection = len(data), self._connection
        if not self._unsent and size <= FRAME_BYTES and size <= self.window and size <= connection.window:
            self.window -= size
            connection.window -= size
            connection.write(HEAD.pack(size >> 16, size & 0xFFFF, DATA, 0, self.number) + data)
        else:
            self._unsent += data
            self.flush()

    def send_end(self) -> None:
        """No more data and no trailers; only after all data has been sent."""
        self._connection.write(frame(DATA, END_STREAM, self.number))
        self._end()

    def flush(self) -> None:
        """Send what the peer's windows allow."""
        connection = self._connection
        room = min(self.window, connection.window, len(self._unsent))
        data = bytes(memoryview(self._unsent)[:room]) if room > 0 else b""
        places = range(0, len(data), FRAME_BYTES)
        frames = [frame(DATA, 0, self.number, data[at : at + FRAME_BYTES]) for at in places]
        if frames:
            del self._unsent[:room]
            self.window -= room
            connection.window -= room
            connection.write(b"".join(frames))
        if self._last is not None and not self._unsent:
            self.send_headers(self._last, end=True)

    def reset(self, code: int = CANCEL) -> None:
        """Cut it off, both ways; its listener hears nothing more."""
        if not (self.ended_here and self.ended_there):
            self._connection.write(reset(self.number, code))
        self.ended_there = True
        self._end()

    def lose(self, error: str) -> None:
        """The peer is through with it; with an error it is gone both ways."""
        if self.ended_there:
            if error:
                self._end()
            return
        self.ended_there = True
        if error:
            self._end()
        elif self.ended_here:
            self._connection.forget(self)
        if self.listener is not None:
            self.listener.ended(error)

    def _end(self) -> None:
        self.ended_here = True
        self._unsent.clear()
        if self.ended_there:
            self._connection.forget(self)


class Connection(asyncio.Protocol):
    """One socket with many streams. `accept` (a server's) is told of a new one and its headers."""

    def __init__(self, accept: Callable[[Stream, Headers], None] | None = None) -> None:
        self.window = self.stream_window = DEFAULT_WINDOW
        self.paused = False
        self.streams: dict[int, Stream] = {}
        self.lost = asyncio.get_running_loop().create_future()
        self._accept = accept
        self._transport: asyncio.Transport | None = None
        self._kept = b""
        self._greeted = accept is None
        self._decoder = Decoder()
        self._number = -1  # the newest stream
        self._block: tuple[int, int, bytearray] | None = None  # headers that are not complete
        self._received = 0
        self._waiters: list[asyncio.Future[None]] = []

    def open(self) -> Stream:
        """A client's new stream."""
        self._number += 2
        stream = self.streams[self._number] = Stream(self, self._number)
        return stream

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def forget(self, stream: Stream) -> None:
        self.streams.pop(stream.number, None)
        self._wake()

    def close(self, code: int = NO_ERROR) -> None:
        """Say goodbye; what is written still leaves."""
        if self._transport is not None:
            newest = max(self._number, 0) if self._accept is not None else 0
            self.write(frame(GOAWAY, 0, 0, struct.pack(">LL", newest, code)))
            self._transport.close()

    async def progress(self) -> None:
        """Wait until the peer took something, or a stream ended."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for one in waiters:
            if not one.done():
                one.set_result(None)

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # which uvloop's is without saying so
        settings = frame(SETTINGS, 0, 0, PAIR.pack(INITIAL_WINDOW, WIDEST))
        wider = frame(WINDOW, 0, 0, (WIDEST - DEFAULT_WINDOW).to_bytes(4, "big"))
        self._transport.write((PREFACE if self._accept is None else b"") + settings + wider)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        for stream in tuple(self.streams.values()):
            stream.lose("the connection was lost" if error is None else f"the connection was lost: {error}")
        self._wake()
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._kept:
            data = self._kept + data
        try:
            self._kept = data[self._frames(data) :]
        except (Broken, BadHeaders) as error:
            self._kept = b""
            for stream in tuple(self.streams.values()):
                stream.lose(str(error))
            self.close(error.code if isinstance(error, Broken) else PROTOCOL_ERROR)

    # Frames

    def _frames(self, data: bytes) -> int:
        """Take in all complete frames; says where they end."""
        at, size = 0, len(data)
        if not self._greeted:
            if data[: len(PREFACE)] != PREFACE[:size]:
                raise Broken("not HTTP/2")
            if size < len(PREFACE):
                return 0
            self._greeted, at = True, len(PREFACE)
        while size - at >= HEAD.size:
            high, low, kind, flags, number = HEAD.unpack_from(data, at)
            length = high << 16 | low
            if length > FRAME_BYTES:
                raise Broken("a frame that is too long")
            begin = at + HEAD.size
            if begin + length > size:
                break
            at = begin + length
            self._frame(kind, flags, number & WIDEST, data[begin:at])
        return at

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and (kind != CONTINUATION or self._block[0] != number):
            raise Broken("headers that are not continued")
        if kind == DATA:
            self._data(flags, number, payload)
        elif kind in (HEADERS, CONTINUATION):
            self._headers(kind, flags, number, payload)
        elif kind == RESET:
            if number in self.streams:
                self.streams[number].lose(f"the peer ended the stream ({int.from_bytes(payload, 'big')})")
        elif kind == SETTINGS and not flags & ACK:
            self._settings(payload)
        elif kind == PING and not flags & ACK:
            self.write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self._goaway(int.from_bytes(payload[:4], "big") & WIDEST)
        elif kind == WINDOW:
            self._widened(number, int.from_bytes(payload, "big") & WIDEST)
        elif kind == PUSH:
            raise Broken("a push")

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        self._received = self._counted(self._received + len(payload), 0)
        stream = self.streams.get(number)
        if stream is None or stream.ended_there:
            return  # it crossed our reset
        stream.received = self._counted(stream.received + len(payload), number)
        data = unpadded(payload) if flags & PADDED else payload
        if data and stream.listener is not None:
            stream.listener.data(data)
        if flags & END_STREAM:
            stream.lose("")

    def _counted(self, received: int, number: int) -> int:
        """Widen a window again before it is used up."""
        if received < TOP_UP:
            return received
        self.write(frame(WINDOW, 0, number, received.to_bytes(4, "big")))
        return 0

    def _headers(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            payload = unpadded(payload) if flags & PADDED else payload
            self._block = (number, flags, bytearray(payload[5:] if flags & PRIORITIZED else payload))
        elif self._block is None:
            raise Broken("a continuation of nothing")
        else:
            self._block[2].extend(payload)
        if len(self._block[2]) > BLOCK_BYTES:
            raise Broken("headers that are too long")
        if flags & END_HEADERS:
            (number, flags, block), self._block = self._block, None
            self._told(number, self._decoder.read(bytes(block)), bool(flags & END_STREAM))

    def _told(self, number: int, headers: Headers, end: bool) -> None:
        stream = self.streams.get(number)
        if stream is not None:
            if stream.listener is not None:
                stream.listener.headers(headers)
        elif self._accept is not None and number > self._number and number % 2:
            self._number = number
            stream = self.streams[number] = Stream(self, number)
            self._accept(stream, headers)
        if stream is not None and end:
            stream.lose("")

    def _settings(self, payload: bytes) -> None:
        for name, value in PAIR.iter_unpack(payload[: len(payload) // PAIR.size * PAIR.size]):
            if name == INITIAL_WINDOW:
                for stream in self.streams.values():
                    stream.window += value - self.stream_window
                self.stream_window = value
        self.write(frame(SETTINGS, ACK, 0))
        self._flush()

    def _goaway(self, newest: int) -> None:
        if self._accept is None:  # streams beyond were never seen; the others may finish
            for stream in tuple(self.streams.values()):
                if stream.number > newest:
                    stream.lose("the peer is going away")

    def _widened(self, number: int, by: int) -> None:
        if number == 0:
            self.window += by
        elif number in self.streams:
            self.streams[number].window += by
        if self.window > WIDEST:
            raise Broken("a window that is too wide", FLOW_CONTROL_ERROR)
        self._flush()

    def _flush(self) -> None:
        for stream in tuple(self.streams.values()):
            stream.flush()
        self._wake()


def frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, number) + payload


def reset(number: int, code: int) -> bytes:
    return frame(RESET, 0, number, code.to_bytes(4, "big"))


def unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Broken("more padding than payload")
    return payload[1 : len(payload) - payload[0]]
