"""GGUF blocks mean what gguf-py says they mean, bit for bit, for every type we read."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from textmill.quant import ggml, ggml_types

READABLE = [number for number in ggml_types.GGML_TYPES if ggml.can_read(number)]


def random_blocks(number: int, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes whose 16-bit scales are finite and of both signs."""
    kind = ggml_types.GGML_TYPES[number]
    rng = np.random.default_rng(seed)
    if kind.block == 1:
        values = rng.standard_normal(count * 256).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType(number)).view(np.uint8).reshape(-1)
    blocks = rng.integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2)):
        if at == 2 and kind.name not in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
            continue
        blocks[:, at : at + 2] = rng.standard_normal(count).astype("<f2").view(np.uint8).reshape(count, 2)
    return blocks.reshape(-1)


@pytest.mark.parametrize("number", READABLE, ids=lambda number: ggml_types.GGML_TYPES[number].name)
def test_dequantize_equals_gguf_bit_for_bit(number: int) -> None:
    data = random_blocks(number, 40)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(number)).reshape(-1)
    got = ggml.dequantize(number, data, (expected.size,))
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("number", list(ggml.LAYOUTS), ids=lambda number: ggml_types.GGML_TYPES[number].name)
def test_packed_matrix_keeps_its_layout(number: int) -> None:
    kind, layout = ggml_types.GGML_TYPES[number], ggml.LAYOUTS[number]
    data = random_blocks(number, 6)
    packed = ggml.unpack(number, data, 3, 2 * kind.block)
    assert packed.shape == (3, 2 * kind.block)
    assert packed.codes.dtype == np.uint8
    assert int(packed.codes.max()) < 1 << layout.bits
    assert (packed.bits, packed.group, packed.zero) == (layout.bits, layout.group, layout.zero)
    expected = gguf.quants.dequantize(data.reshape(3, -1), gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(packed.dequantize(), expected)


def test_block_sizes_are_those_of_gguf() -> None:
    for number, kind in ggml_types.GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.block, kind.bytes)
