"""Writes small GGUF files byte by byte, so that tests can also write wrong ones."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_SCALARS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A typed value: bool, int (as u32), float, str, or a list of one kind of them."""
    kind, data = _typed(item)
    return struct.pack("<I", kind) + data


def _typed(item: Any) -> tuple[int, bytes]:
    if isinstance(item, bool):
        return 7, struct.pack("<?", item)
    if isinstance(item, int):
        return 4, struct.pack("<I", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if isinstance(item, str):
        return 8, string(item)
    kinds = [_typed(one) for one in item]
    return 9, struct.pack("<IQ", kinds[0][0], len(kinds)) + b"".join(data for _, data in kinds)


def tensor_info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`shape` in row-major order; the file holds it reversed."""
    dims = b"".join(struct.pack("<Q", size) for size in shape[::-1])
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def header(version: int, tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A whole file; a tensor is (ggml type, shape in row-major order, its bytes)."""
    alignment = metadata.get("general.alignment", 32)
    out = header(3, len(tensors), len(metadata))
    out += b"".join(string(key) + value(item) for key, item in metadata.items())
    offset, data = 0, b""
    for name, (kind, shape, stored) in tensors.items():
        out += tensor_info(name, shape, kind, offset)
        padded = stored + bytes(-len(stored) % alignment)
        offset += len(padded)
        data += padded
    return out + bytes(-len(out) % alignment) + data


def floats(array: np.ndarray) -> tuple[int, tuple[int, ...], bytes]:
    """A float32 tensor for `gguf_bytes`."""
    return 0, array.shape, array.astype("<f4").tobytes()
