"""What a picture's first bytes say: its format and size, read without decoding anything."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's markers of frames; the others are tables
ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # JPEG's markers without a length
MOST_SEGMENTS = 1000


@dataclass(frozen=True, slots=True)
class Header:
    """`kind` is Pillow's name of the format."""

    kind: str
    height: int
    width: int


def read_header(data: bytes) -> Header | None:
    """The header of a PNG, JPEG, GIF or WebP; None for anything else, and for one that is cut off or broken."""
    for begins, reader in READERS:
        if data.startswith(begins):
            try:
                return reader(data)
            except (struct.error, IndexError):
                return None
    return None


def png(data: bytes) -> Header | None:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    return Header("PNG", height, width) if kind == b"IHDR" and length == 13 else None


def gif(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("GIF", height, width)


def jpeg(data: bytes) -> Header | None:
    """Walks from marker to marker as far as the one that tells the size."""
    at = 2
    for _ in range(MOST_SEGMENTS):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif marker in ALONE:
            at += 2
        elif marker in SIZES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("JPEG", height, width)
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def webp(data: bytes) -> Header | None:
    """Lossy, lossless and extended files each have their own place for the size."""
    if data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WEBP", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("WEBP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = data[24:27], data[27:30]
        struct.unpack("3s3s", width + height)  # raises if there is less
        return Header("WEBP", int.from_bytes(height, "little") + 1, int.from_bytes(width, "little") + 1)
    return None


READERS: tuple[tuple[bytes, Callable[[bytes], Header | None]], ...] = (
    (b"\x89PNG\r\n\x1a\n", png),
    (b"\xff\xd8", jpeg),
    (b"GIF87a", gif),
    (b"GIF89a", gif),
    (b"RIFF", webp),
)
