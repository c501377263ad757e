"""Packed matrices: taking, cutting and joining never change a value; the product is that of rounded activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textmill.kernels import native, reference
from textmill.quant import ggml, ggml_types
from textmill.quant.packed import Packed

LARGEST = {32: 64}  # Q6_K keeps six bits in eight


def random_packed(rows: int, inputs: int, bits: int, group: int, zero: int, offsets: bool, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    groups = inputs // group
    return Packed(
        rng.integers(0, LARGEST.get(zero, 1 << bits), (rows, inputs), dtype=np.uint8),
        rng.standard_normal((rows, groups), dtype=np.float32),
        rng.standard_normal((rows, groups), dtype=np.float32) if offsets else None,
        zero,
        bits,
    )


LAYOUTS = [(4, 32, 8, False), (4, 32, 0, True), (8, 32, 128, False), (8, 16, 32, False), (4, 64, 0, True)]
layouts = st.sampled_from(LAYOUTS)


def test_what_eight_bits_cannot_hold_is_refused() -> None:
    low, high = random_packed(2, 64, 8, 32, 0, False), random_packed(2, 64, 8, 32, 200, False)
    with pytest.raises(ValueError, match="no common layout"):
        Packed.join([low, high])


def test_dequantize_is_the_formula() -> None:
    packed = random_packed(3, 64, 4, 32, 8, True)
    assert packed.offsets is not None
    for row, column in ((0, 0), (1, 31), (2, 32), (2, 63)):
        group = column // 32
        scale, offset = packed.scales[row, group], packed.offsets[row, group]
        value = scale * (float(packed.codes[row, column]) - 8) + offset
        assert packed.dequantize()[row, column] == value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_take_and_cut_are_slices(layout: tuple[int, int, int, bool]) -> None:
    packed = random_packed(8, 128, *layout)
    dense = packed.dequantize()
    rows = np.array([5, 0, 5])
    np.testing.assert_array_equal(packed.take(rows).dequantize(), dense[rows])
    np.testing.assert_array_equal(packed.cut(0, 2, 6).dequantize(), dense[2:6])
    np.testing.assert_array_equal(packed.cut(1, 64, 128).dequantize(), dense[:, 64:])


def test_a_group_is_never_cut_in_two() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        random_packed(2, 64, 4, 32, 0, False).cut(1, 16, 48)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(layouts, st.integers(1, 4)), min_size=1, max_size=4))
def test_join_keeps_every_value(parts: list[tuple[tuple[int, int, int, bool], int]]) -> None:
    packed = [random_packed(rows, 128, *layout, seed=number) for number, (layout, rows) in enumerate(parts)]
    joined = Packed.join(packed)
    np.testing.assert_array_equal(joined.dequantize(), np.concatenate([part.dequantize() for part in packed]))
    assert int(joined.codes.max()) < 1 << joined.bits
    if len({part.layout for part in packed}) == 1:
        assert joined.layout == packed[0].layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matmul_is_the_product_of_rounded_activations(layout: tuple[int, int, int, bool]) -> None:
    packed = random_packed(5, 128, *layout)
    x = torch.randn(2, 3, 128)
    chunks = x.reshape(2, 3, 4, 32)
    step = chunks.abs().amax(-1, keepdim=True) / 127
    rounded = (torch.round(chunks / step) * step).reshape(x.shape)
    dense = torch.from_numpy(packed.dequantize())
    torch.testing.assert_close(packed.matmul(x), rounded @ dense.T, rtol=1e-4, atol=1e-3)
    assert not torch.equal(packed.matmul(x), x @ dense.T)
    assert torch.equal(reference.dequantize(packed), dense)


@pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built here")
@pytest.mark.parametrize("number", [2, 3, 8, 12, 14], ids=lambda number: ggml_types.GGML_TYPES[number].name)
def test_the_native_unpacker_gives_the_same(number: int) -> None:
    kind = ggml_types.GGML_TYPES[number]
    rng = np.random.default_rng(number)
    data = rng.integers(0, 256, 12 * kind.bytes, dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # random bytes make scales that are no numbers
        expected = ggml.unpack_reference(number, data, 6, 2 * kind.block)
    got = ggml.unpack(number, data, 6, 2 * kind.block)
    assert native.ggml_supported(number)
    assert got.layout == expected.layout
    np.testing.assert_array_equal(got.codes, expected.codes)
    np.testing.assert_array_equal(got.scales, expected.scales)
    if got.offsets is not None and expected.offsets is not None:
        np.testing.assert_array_equal(got.offsets, expected.offsets)
