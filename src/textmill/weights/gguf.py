"""Reads a GGUF file's header with every number checked against the file, in a fraction of a second and little memory.

Source of the layout: ggml's docs/gguf.md. Versions 2 and 3, little-endian. Tensor bytes are views on a memory map.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textmill.errors import ModelError
from textmill.quant.ggml_types import GGML_TYPES, GgmlType

if TYPE_CHECKING:  # numpy costs a router start-up time that it does not need
    import numpy as np
    from numpy.typing import NDArray

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# Generous against real files (the largest vocabularies have 262 thousand tokens and 515 thousand merges), but small
# enough that no header can make us build a list that does not fit in memory.
_MAX_STRINGS = 4 << 20
_MAX_NUMBERS = 16 << 20
_MAX_NAME = 65535
_MAX_ALIGNMENT = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_METADATA_KEYS = 65536
_MAX_TENSORS = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies; `shape` is in row-major (torch) order, `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file: `metadata`, `tensors`, and `data(name)`. Raises ModelError naming the file and the field."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        header = _Header(self._map, self.path)
        self.version, tensor_count, key_count = header.counts()
        self.metadata: dict[str, Any] = header.metadata(key_count)
        self.tensors: dict[str, GgufTensor] = header.tensors(tensor_count, _alignment(self.metadata, self.path))

    def data(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor: a read-only view, valid as long as it is referenced."""
        import numpy as np

        tensor = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path}: cannot be read as a GGUF file: {error}") from error


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise ModelError(f"{path}: general.alignment: {value!r} is not a power of two up to {_MAX_ALIGNMENT}")
    return value


class _Header:
    """A position in the mapped file that only moves forward, and never past its end."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.position = 0

    def fail(self, field: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {field}: {problem}")

    def need(self, count: int, field: str) -> int:
        """Moves over `count` bytes and returns where they start."""
        start = self.position
        if count > self.size - start:
            raise self.fail(field, f"needs {count} bytes at offset {start}, the file has {self.size - start} left")
        self.position = start + count
        return start

    def u32(self, field: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.need(4, field))[0])

    def u64(self, field: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.need(8, field))[0])

    def name(self, field: str) -> str:
        length = self.u64(field)
        if length > _MAX_NAME:
            raise self.fail(field, f"a name of {length} bytes is too long")
        start = self.need(length, field)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(field, "the name is not UTF-8") from error

    def counts(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata keys."""
        if self.buffer[:4] != b"GGUF":
            raise self.fail("magic", "this is not a GGUF file")
        self.position = 4
        version = self.u32("version")
        if version not in (2, 3):
            kind = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise self.fail("version", f"{kind} is not supported (2 and 3, little-endian, are)")
        tensors, keys = self.u64("tensor_count"), self.u64("metadata_kv_count")
        if tensors > _MAX_TENSORS:
            raise self.fail("tensor_count", f"{tensors} is impossible")
        if keys > _MAX_METADATA_KEYS:
            raise self.fail("metadata_kv_count", f"{keys} is impossible")
        return version, tensors, keys

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(count):
            key = self.name(f"metadata key {index}")
            if key in found:
                raise self.fail(key, "the key occurs twice")
            found[key] = self.value(self.u32(key), key)
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.strings(1, key)[0]
        if kind == _ARRAY:
            return self.array(key)
        return self.numbers(kind, 1, key)[0]

    def array(self, key: str) -> list[Any]:
        kind, count = self.u32(key), self.u64(key)
        if kind == _STRING:
            return self.strings(count, key)
        if kind == _ARRAY:
            raise self.fail(key, "arrays of arrays are not supported")
        return self.numbers(kind, count, key)

    def numbers(self, kind: int, count: int, key: str) -> list[Any]:
        code = _SCALARS.get(kind)
        if code is None:
            raise self.fail(key, f"value type {kind} does not exist")
        if count > _MAX_NUMBERS:
            raise self.fail(key, f"{count} elements are too many")
        layout = struct.Struct(f"<{count}{code}")
        return list(layout.unpack_from(self.buffer, self.need(layout.size, key)))

    def strings(self, count: int, key: str) -> list[str]:
        """`count` strings; a tight loop, since a vocabulary has a hundred thousand of them."""
        if count > _MAX_STRINGS or count * 8 > self.size - self.position:
            raise self.fail(key, f"{count} strings do not fit in the file")
        buffer, position, size, length_at = self.buffer, self.position, self.size, _U64.unpack_from
        found: list[str] = []
        for _ in range(count):
            if position + 8 > size:
                raise self.fail(key, f"the file ends in string {len(found)}")
            start = position + 8
            position = start + length_at(buffer, position)[0]
            if position > size:
                raise self.fail(key, f"string {len(found)} of {position - start} bytes passes the end of the file")
            found.append(buffer[start:position].decode("utf-8", "replace"))
        self.position = position
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for index in range(count):
            tensor = self.tensor(index, alignment)
            if tensor.name in found:
                raise self.fail(tensor.name, "the tensor occurs twice")
            found[tensor.name] = tensor
        start = -(-self.position // alignment) * alignment
        placed = {name: self.place(tensor, start) for name, tensor in found.items()}
        self.check_overlaps(placed)
        return placed

    def tensor(self, index: int, alignment: int) -> GgufTensor:
        """One tensor's description; its offset is still relative to the data section."""
        name = self.name(f"tensor {index} name")
        dimensions = self.u32(name)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(name, f"{dimensions} dimensions")
        shape = tuple(self.u64(name) for _ in range(dimensions))[::-1]
        number, offset = self.u32(name), self.u64(name)
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise self.fail(name, f"tensor type {number} does not exist")
        if offset % alignment:
            raise self.fail(name, f"offset {offset} is not a multiple of {alignment}")
        return GgufTensor(name, shape, number, offset, self.tensor_bytes(name, shape, kind))

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: GgmlType) -> int:
        if 0 in shape or shape[-1] % kind.block:
            raise self.fail(name, f"shape {list(shape)} is impossible for {kind.name} (blocks of {kind.block})")
        return prod(shape) // kind.block * kind.bytes

    def place(self, tensor: GgufTensor, start: int) -> GgufTensor:
        offset = start + tensor.offset
        if offset + tensor.nbytes > self.size:
            raise self.fail(
                tensor.name, f"{tensor.nbytes} bytes at offset {offset} pass the end of the file ({self.size} bytes)"
            )
        return GgufTensor(tensor.name, tensor.shape, tensor.ggml_type, offset, tensor.nbytes)

    def check_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self.fail(after.name, f"its bytes overlap those of {before.name}")
