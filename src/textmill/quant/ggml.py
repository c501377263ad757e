"""GGUF's block formats as Packed matrices and as floats, exact to the files' meaning.

Every block type is integer codes with a scale (and an offset) per group, so one unpacking serves both. Sources:
ggml-common.h and ggml-quants.c; the numpy code here is the reference, the native unpacker the fast road.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from textmill.kernels import native
from textmill.quant import ggml_types as types
from textmill.quant.packed import Packed

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_FOUR = np.uint8(4)
# codes [blocks, elements], scales [blocks, groups], offsets [blocks, groups] or None
Unpacked = tuple[Bytes, Floats, Floats | None]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a block type looks as Packed."""

    bits: int
    group: int
    zero: int
    unpack: Callable[[Bytes], Unpacked]


def can_pack(number: int) -> bool:
    """True if tensors of this ggml type can stay packed."""
    return number in LAYOUTS


def can_read(number: int) -> bool:
    """True if tensors of this ggml type can be made floats."""
    return number in LAYOUTS or number in _PLAIN


def unpack(number: int, data: Bytes, rows: int, inputs: int) -> Packed:
    """The stored bytes of a matrix [rows, inputs] of a type that `can_pack`; natively where the kernels can."""
    if not native.ggml_supported(number):
        return unpack_reference(number, data, rows, inputs)
    codes, scales, offsets, zero, bits, _ = native.ggml_unpack(number, data, rows, inputs)
    return Packed(codes, scales, offsets, zero, bits)


def unpack_reference(number: int, data: Bytes, rows: int, inputs: int) -> Packed:
    """The same in numpy: the meaning of every block type."""
    layout = LAYOUTS[number]
    codes, scales, offsets = layout.unpack(_blocks(number, data))
    return Packed(
        codes.reshape(rows, inputs),
        scales.reshape(rows, -1),
        None if offsets is None else offsets.reshape(rows, -1),
        layout.zero,
        layout.bits,
    )


def dequantize(number: int, data: Bytes, shape: tuple[int, ...]) -> Floats:
    """The stored bytes of a tensor of a type that `can_read`, in float32."""
    if number in _PLAIN:
        return _PLAIN[number](data).reshape(shape)
    return (
        unpack(number, data, data.size // types.GGML_TYPES[number].bytes, types.GGML_TYPES[number].block)
        .dequantize()
        .reshape(shape)
    )


def _blocks(number: int, data: Bytes) -> Bytes:
    return data.reshape(-1, types.GGML_TYPES[number].bytes)


def _half(blocks: Bytes, at: int) -> Floats:
    """The 16-bit float at byte `at` of each block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(data: Bytes, run: int) -> Bytes:
    """Bytes in runs: the low nibbles of a run, then its high nibbles: [blocks, 2 * bytes]."""
    runs = data.reshape(data.shape[0], -1, run)
    out = np.empty((data.shape[0], runs.shape[1], 2, run), dtype=np.uint8)
    np.bitwise_and(runs, 15, out=out[:, :, 0])
    np.right_shift(runs, 4, out=out[:, :, 1])
    return out.reshape(data.shape[0], -1)


def _fields(data: Bytes, run: int, bits: int) -> Bytes:
    """Bytes in runs: the lowest `bits` of all bytes of a run, then the next ones, and so on up to eight bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(data.shape[0], -1, 1, run)
    return ((runs >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(data.shape[0], -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 bits at byte `at` as the codes' bit of value 16: [blocks, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << _FOUR


def _q4_0(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Unpacked:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0), None  # int8 + 128 as a byte


def _q2_k(blocks: Bytes) -> Unpacked:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15)
    offsets = _half(blocks, 82) * (blocks[:, :16] >> 4)
    return _fields(blocks[:, 16:80], 32, 2), scales, -offsets


def _q3_k(blocks: Bytes) -> Unpacked:
    """Codes 0..7 around 4: two low bits, and the mask's bit (one plane of 32 per eighth of the block) as the third."""
    low, high = _fields(blocks[:, 96:104], 8, 4), _fields(blocks[:, 104:108], 4, 2)
    scales = _half(blocks, 108) * ((low | (high << 4)).astype(np.float32) - 32)
    return _fields(blocks[:, 32:96], 32, 2) | (_fields(blocks[:, :32], 32, 1) << np.uint8(2)), scales, None


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 scales and 8 minima of six bits in the 12 bytes of Q4_K and Q5_K."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)], axis=1)
    return scales, minima


def _q4_k(blocks: Bytes) -> Unpacked:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    return _nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q5_k(blocks: Bytes) -> Unpacked:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) | (_fields(blocks[:, 16:48], 32, 1) << _FOUR)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: Bytes) -> Unpacked:
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _nibbles(blocks[:, :128], 64) | (_fields(blocks[:, 128:192], 32, 2) << _FOUR), scales, None


# The 16 values that a nibble of IQ4_NL and IQ4_XS stands for, as codes around 128.
_IQ4_TABLE = (
    np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int16) + 128
).astype(np.uint8)


def _iq4_nl(blocks: Bytes) -> Unpacked:
    return _IQ4_TABLE[_nibbles(blocks[:, 2:], 16)], _half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Unpacked:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = _half(blocks, 0) * ((low | (high << 4)).astype(np.float32) - 32)
    return _IQ4_TABLE[_nibbles(blocks[:, 8:], 16)], scales, None


LAYOUTS: dict[int, Layout] = {
    types.Q4_0: Layout(4, 32, 8, _q4_0),
    types.Q4_1: Layout(4, 32, 0, _q4_1),
    types.Q5_0: Layout(8, 32, 16, _q5_0),
    types.Q5_1: Layout(8, 32, 0, _q5_1),
    types.Q8_0: Layout(8, 32, 128, _q8_0),
    types.Q2_K: Layout(4, 16, 0, _q2_k),
    types.Q3_K: Layout(4, 16, 4, _q3_k),
    types.Q4_K: Layout(4, 32, 0, _q4_k),
    types.Q5_K: Layout(8, 32, 0, _q5_k),
    types.Q6_K: Layout(8, 16, 32, _q6_k),
    types.IQ4_NL: Layout(8, 32, 128, _iq4_nl),
    types.IQ4_XS: Layout(8, 32, 128, _iq4_xs),
}


def _bfloat16(data: Bytes) -> Floats:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: dict[int, Callable[[Bytes], Floats]] = {
    types.F32: lambda data: data.view("<f4").astype(np.float32),
    types.F16: lambda data: data.view("<f2").astype(np.float32),
    types.BF16: _bfloat16,
}
