"""HPACK (RFC 7541): how HTTP/2 writes headers. Reads everything a peer may send, writes plain literals only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import cache

Headers = list[tuple[bytes, bytes]]
ENTRY_OVERHEAD = 32  # bytes that the RFC counts for an entry beside its name and value
TABLE_SIZE = 4096  # what a peer may use before it has heard from us, and after
LONGEST_NUMBER = 1 << 31
STATIC_NAMES = (  # appendix A: name, or name=value; "_" stands for a space
    ":authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https :status=200 :status=204 "
    ":status=206 :status=304 :status=400 :status=404 :status=500 accept-charset accept-encoding=gzip,_deflate "
    "accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
    "content-disposition content-encoding content-language content-length content-location content-range content-type "
    "cookie date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since "
    "last-modified link location max-forwards proxy-authenticate proxy-authorization range referer refresh "
    "retry-after server set-cookie strict-transport-security transfer-encoding user-agent vary via www-authenticate "
)
CODE_LENGTHS = bytes.fromhex(  # appendix B, by byte, the end-of-string mark last: the code is canonical
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b080606060505050606060606"
    "060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e060f050605060506060605070706060605"
    "06070605050607070707070f0b0e0d1c14161414161616171617171717171817181816171817171717151617161717181615141616171715"
    "1716161815161717151516151716171714161616171616171a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b"
    "14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a1e"
)


class BadHeaders(Exception):
    """A block that no encoder writes; the connection's two ends no longer agree."""


@cache
def static_table() -> tuple[tuple[bytes, bytes], ...]:
    pairs = [one.replace("_", " ").encode().partition(b"=") for one in STATIC_NAMES.split(" ") if one]
    return tuple((name, value) for name, _, value in pairs)


@cache
def symbols() -> dict[tuple[int, int], int]:
    """From (length in bits, code) to the byte it stands for."""
    found, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(CODE_LENGTHS)):
        code <<= length - before
        found[length, code] = symbol
        code, before = code + 1, length
    return found


def unpacked(data: bytes) -> bytes:
    """The text behind a Huffman code."""
    table, out, code, length = symbols(), bytearray(), 0, 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, length = code << 1 | byte >> shift & 1, length + 1
            symbol = table.get((length, code))
            if symbol is not None:
                if symbol > 255:
                    raise BadHeaders("an end of string inside a string")
                out.append(symbol)
                code = length = 0
    if length > 7 or code != (1 << length) - 1:
        raise BadHeaders("a string that does not end with ones")
    return bytes(out)


class Decoder:
    """Reads the header blocks of one connection, in order; the table of what was said before is its state."""

    def __init__(self) -> None:
        self._known: deque[tuple[bytes, bytes]] = deque()
        self._size = 0
        self._limit = TABLE_SIZE

    def read(self, block: bytes) -> Headers:
        """Raises BadHeaders."""
        try:
            return self._read(block)
        except IndexError:
            raise BadHeaders("a block that ends early or names what is not there") from None

    def _read(self, block: bytes) -> Headers:
        headers: Headers = []
        at = 0
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = number(block, at, 7)
                headers.append(self._entry(index))
            elif first & 0xE0 == 0x20:
                size, at = number(block, at, 5)
                self._resize(size)
            else:
                pair, at = self._literal(block, at, 6 if first & 0x40 else 4)
                headers.append(pair)
                if first & 0x40:
                    self._keep(pair)
        return headers

    def _literal(self, block: bytes, at: int, bits: int) -> tuple[tuple[bytes, bytes], int]:
        index, at = number(block, at, bits)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = string(block, at)
        value, at = string(block, at)
        return (name, value), at

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if not index:
            raise BadHeaders("an index of zero")
        table = static_table()
        return table[index - 1] if index <= len(table) else self._known[index - len(table) - 1]

    def _keep(self, pair: tuple[bytes, bytes]) -> None:
        self._known.appendleft(pair)
        self._size += len(pair[0]) + len(pair[1]) + ENTRY_OVERHEAD
        self._shrink()

    def _resize(self, size: int) -> None:
        if size > TABLE_SIZE:
            raise BadHeaders("a table larger than we allow")
        self._limit = size
        self._shrink()

    def _shrink(self) -> None:
        while self._size > self._limit:
            name, value = self._known.pop()
            self._size -= len(name) + len(value) + ENTRY_OVERHEAD


def number(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number whose first byte has so many bits of it, and where the next thing begins."""
    most = (1 << bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte, at = block[at], at + 1
        value += (byte & 0x7F) << shift
        shift += 7
        if value > LONGEST_NUMBER:
            raise BadHeaders("a number that is too large")
        if byte < 0x80:
            return value, at


def string(block: bytes, at: int) -> tuple[bytes, int]:
    packed = block[at] & 0x80
    length, at = number(block, at, 7)
    data = block[at : at + length]
    if len(data) < length:
        raise BadHeaders("a string that ends early")
    return unpacked(data) if packed else data, at + length


def written(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block that any decoder reads, whatever was said before."""
    return b"".join(b"\0" + _written(name) + _written(value) for name, value in headers)


def _written(text: bytes) -> bytes:
    """Length, seven bits in the first byte, then the bytes as they are."""
    left = len(text) - 0x7F
    if left < 0:
        return bytes([len(text)]) + text
    out = [0x7F]
    while left > 0x7F:
        out.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([*out, left]) + text
