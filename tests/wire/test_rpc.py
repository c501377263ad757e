"""Our gRPC against the original's: either may be the client or the server; and what no peer should send."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from textmill.wire import hpack, http2
from textmill.wire.http2 import DATA, GOAWAY, HEADERS, PREFACE, RESET, SETTINGS, frame
from textmill.wire.names import MESSAGE_BYTES
from textmill.wire.rpc import UNIMPLEMENTED, Call, Channel, RpcError, Server, unary

LARGE = os.urandom(3_000_000)  # many frames, and more than a first window


async def reversed_(message: bytes) -> bytes:
    if message == b"bad":
        raise ValueError("a b\nc %")
    return message[::-1]


def echo(call: Call) -> None:
    """Sends every message back; ends after an empty one."""
    call.begin()

    def take(message: bytes) -> None:
        if message:
            call.send(message)
        else:
            call.finish()

    call.on_message = take


@asynccontextmanager
async def ours(folder: Path) -> AsyncIterator[Path]:
    server = Server({"/s/Reverse": unary(reversed_), "/s/Echo": echo})
    await server.start(folder / "socket")
    try:
        yield folder / "socket"
    finally:
        await server.stop(0.2)


@asynccontextmanager
async def theirs(folder: Path) -> AsyncIterator[Path]:
    async def reverse(message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if message == b"bad":
            await context.abort(grpc.StatusCode.INTERNAL, "ValueError: a b\nc %")
        return message[::-1]

    async def echo(
        messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        await context.send_initial_metadata(())
        async for message in messages:
            if not message:
                return
            yield message

    handlers = {
        "Reverse": grpc.unary_unary_rpc_method_handler(reverse),
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
    }
    limit = ("grpc.max_receive_message_length", MESSAGE_BYTES)
    server = grpc.aio.server(options=(limit,))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))
    server.add_insecure_port(f"unix:{folder / 'socket'}")
    await server.start()
    try:
        yield folder / "socket"
    finally:
        await server.stop(0.2)


@pytest.mark.parametrize("serving", [ours, theirs])
async def test_our_client(tmp_path: Path, serving: Callable[[Path], object]) -> None:
    async with serving(tmp_path) as socket:  # type: ignore[attr-defined]
        channel = await Channel.to(socket)
        assert await channel.ask("/s/Reverse", b"abc", 5) == b"cba"
        assert await channel.ask("/s/Reverse", LARGE, 5) == LARGE[::-1]
        with pytest.raises(RpcError, match="ValueError: a b\nc %"):
            await channel.ask("/s/Reverse", b"bad", 5)
        with pytest.raises(RpcError) as caught:
            await channel.ask("/s/Nothing", b"", 5)
        assert caught.value.status == UNIMPLEMENTED
        got: list[bytes] = []
        call = channel.call("/s/Echo", got.append)
        assert await asyncio.wait_for(call.begun, 5) is None
        for message in (b"1", LARGE, b"2", b""):
            call.send(message)
        assert await asyncio.wait_for(call.over, 5) is None
        assert got == [b"1", LARGE, b"2"]
        assert not call.behind
        channel.close()


async def test_their_client(tmp_path: Path) -> None:
    limit = ("grpc.max_receive_message_length", MESSAGE_BYTES)
    async with ours(tmp_path) as socket, grpc.aio.insecure_channel(f"unix:{socket}", options=(limit,)) as channel:
        reverse = channel.unary_unary("/s/Reverse")
        for _ in range(3):  # the second time its headers are in its table
            assert await reverse(b"abc") == b"cba"
        assert await reverse(LARGE) == LARGE[::-1]
        for request, code in ((b"bad", grpc.StatusCode.INTERNAL), (b"x" * MESSAGE_BYTES, grpc.StatusCode.CANCELLED)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await reverse(request + b"x" * (len(request) > 9))
            assert caught.value.code() is code
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/s/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        stream = channel.stream_stream("/s/Echo")()
        for message in (b"1", LARGE, b"2"):
            await stream.write(message)
            assert await stream.read() == message
        await stream.write(b"")
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_slow_peer_is_waited_for(tmp_path: Path) -> None:
    """A client that does not read: what it is sent waits on our side, and `drained` says when it has left."""
    calls: list[Call] = []

    def handler(call: Call) -> None:
        call.begin()
        calls.append(call)

    server = Server({"/s/Flood": handler})
    await server.start(tmp_path / "socket")
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'socket'}") as channel:
        stream = channel.stream_stream("/s/Flood")()
        await stream.wait_for_connection()
        for _ in range(4):
            calls[0].send(LARGE)
        waiting = asyncio.create_task(calls[0].drained())
        await asyncio.sleep(0.05)
        assert calls[0].behind
        assert not waiting.done()
        calls[0].finish()
        assert [len(one) async for one in stream] == [len(LARGE)] * 4
        await asyncio.wait_for(waiting, 5)
    await server.stop(0.2)


async def test_a_peer_that_leaves_ends_calls_and_waits(tmp_path: Path) -> None:
    calls: list[Call] = []
    server = Server({"/s/Wait": calls.append})
    await server.start(tmp_path / "socket")
    channel = await Channel.to(tmp_path / "socket")
    call = channel.call("/s/Wait", lambda message: None)
    await asyncio.sleep(0.01)
    channel.close()
    for one in (call, calls[0]):
        error = await asyncio.wait_for(one.over, 5)
        assert error is not None
        assert "connection" in error.details
        await asyncio.wait_for(one.drained(), 5)
        one.send(b"into the void")
    await server.stop(0.2)


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    PREFACE + frame(SETTINGS, 0, 0) + b"\xff\xff\xff" + bytes(6),
    PREFACE + frame(HEADERS, 0x4, 1, b"\xff\xff\xff\xff\xff\xff"),
    PREFACE + frame(HEADERS, 0x0, 1, b"") + frame(DATA, 0, 1, b"x"),
    PREFACE + frame(HEADERS, 0xC, 1, b"\x09a"),
    PREFACE + frame(http2.CONTINUATION, 0x4, 1, b""),
    PREFACE + frame(http2.PUSH, 0, 1, b""),
]


@pytest.mark.parametrize("data", GARBAGE)
async def test_garbage_ends_its_own_connection(tmp_path: Path, data: bytes) -> None:
    async with ours(tmp_path) as socket:
        reader, writer = await asyncio.open_unix_connection(socket)
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer[-17:-13] == bytes([0, 0, 8, GOAWAY])
        writer.close()
        channel = await Channel.to(socket)
        assert await channel.ask("/s/Reverse", b"abc", 5) == b"cba"
        channel.close()


async def test_frames_may_arrive_byte_by_byte_with_padding_and_continued_headers(tmp_path: Path) -> None:
    block = hpack.written([(b":method", b"POST"), (b":path", b"/s/Reverse")])
    data = (
        PREFACE
        + frame(HEADERS, 0x8 | 0x20, 1, bytes([3]) + bytes(5) + block[:9] + bytes(3))
        + frame(http2.CONTINUATION, 0x4, 1, block[9:])
        + frame(DATA, 0x8, 1, b"\x02\0\0\0\0" + b"\0\0")
        + frame(http2.PING, 0, 0, b"12345678")
        + frame(99, 0, 7, b"unknown")
        + frame(DATA, 0x1, 1, b"\x03abc")
    )
    async with ours(tmp_path) as socket:
        reader, writer = await asyncio.open_unix_connection(socket)
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await asyncio.sleep(0)
        seen = b""
        while b"grpc-status\x010" not in seen:
            seen += await asyncio.wait_for(reader.read(1000), 5)
        assert b"\0\0\0\0\x03cba" in seen
        assert frame(http2.PING, 0x1, 0, b"12345678") in seen
        writer.close()


async def test_a_message_that_is_compressed_is_refused(tmp_path: Path) -> None:
    block = hpack.written([(b":path", b"/s/Reverse")])
    async with ours(tmp_path) as socket:
        reader, writer = await asyncio.open_unix_connection(socket)
        writer.write(PREFACE + frame(HEADERS, 0x4, 1, block) + frame(DATA, 0, 1, b"\x01\0\0\0\x01a"))
        seen = b""
        while bytes([RESET, 0, 0, 0, 0, 1]) not in seen:
            seen += await asyncio.wait_for(reader.read(1000), 5)
        writer.close()


# RFC 7541, appendix C: three requests in a row, with and without Huffman codes (C.3, C.4).
PLAIN = (
    "828684410f7777772e6578616d706c652e636f6d",
    "828684be58086e6f2d6361636865",
    "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
)
PACKED = (
    "828684418cf1e3c2e5f23a6ba0ab90f4ff",
    "828684be5886a8eb10649cbf",
    "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
)
FIRST = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
THIRD = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    (b":authority", b"www.example.com"),
    (b"custom-key", b"custom-value"),
]


@pytest.mark.parametrize("blocks", [PLAIN, PACKED])
def test_headers_of_the_rfc(blocks: tuple[str, str, str]) -> None:
    decoder = hpack.Decoder()
    read = [decoder.read(bytes.fromhex(block)) for block in blocks]
    assert read == [FIRST, [*FIRST, (b"cache-control", b"no-cache")], THIRD]


def test_what_was_said_before_is_forgotten_in_time() -> None:
    decoder = hpack.Decoder()
    for number in range(200):
        decoder.read(b"\x40\x01a" + b"\x7f\x01" + b"%128d" % number)
    assert decoder.read(b"\xbe") == [(b"a", b"%128d" % 199)]
    with pytest.raises(hpack.BadHeaders):
        decoder.read(bytes([0x80 | 62 + 30]))
    decoder.read(b"\x20")  # a table of no size
    with pytest.raises(hpack.BadHeaders):
        decoder.read(b"\xbe")


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 300, 20_000])
def test_literals_of_any_length(size: int) -> None:
    headers = [(b"name", b"v" * size), (b"n" * size, b"")]
    assert hpack.Decoder().read(hpack.written(headers)) == headers


@pytest.mark.parametrize(
    "block", ["80", "be", "3fe21f", "00", "4085ffffffffff", "7fffffffffffff00", "4081000161", "4003"]
)
def test_blocks_that_no_encoder_writes(block: str) -> None:
    with pytest.raises(hpack.BadHeaders):
        hpack.Decoder().read(bytes.fromhex(block))
