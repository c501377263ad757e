"""What the leading rank tells the others, and how it crosses their sockets: small messages, typed on both ends."""

from __future__ import annotations

import select
import socket
import struct
from typing import TypeAlias

import msgspec

from textmill.core import SlotWork, Step
from textmill.parallel.group import RankLost

_LENGTH = struct.Struct("<I")


class Plan(msgspec.Struct, tag=True, frozen=True):
    """How much a rank has room for; then, from the leader, how much all of them get."""

    slots: int
    blocks: int


class Failure(msgspec.Struct, tag=True, frozen=True):
    """A rank's last words: why it gives up."""

    reason: str


class Order(msgspec.Struct, tag=True, frozen=True):
    """One computation: tokens chosen in the last one (slot, ids), then these steps' changes, then the work.

    With the same tables and the same work every rank computes the same rows, each with its part of the model.
    """

    chosen: tuple[tuple[int, tuple[int, ...]], ...]
    steps: tuple[Step, ...]
    work: tuple[SlotWork, ...]


Message: TypeAlias = Plan | Failure | Order

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Channel:
    """One end of a stream socket between the leader and another rank. RankLost when the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: Message) -> None:
        data = _encoder.encode(message)
        try:
            self._end.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise RankLost(f"another rank takes no messages: {error}") from error

    def receive(self) -> Message:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return _decoder.decode(self._exactly(length))

    def speaks(self, seconds: float) -> bool:
        """Whether the other end says something, or ends, within this time."""
        return bool(select.select([self._end], [], [], seconds)[0])

    def close(self) -> None:
        self._end.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._end.recv(count - len(data))
            except OSError as error:
                raise RankLost(f"another rank sends no messages: {error}") from error
            if not piece:
                raise RankLost("another rank has ended")
            data += piece
        return bytes(data)
