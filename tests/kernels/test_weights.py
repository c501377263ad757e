"""Matrices on their way into the native layout: any memory comes in, wrong shapes are refused, GGUF blocks unpack."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tests.kernels.tiny import random_packed
from textmill.kernels import native, reference
from textmill.kernels.native import dense_weight, ggml_unpack, pack_weight


@pytest.mark.parametrize("as_numpy", [False, True])
def test_packed_rows_come_back(as_numpy: bool) -> None:
    m = random_packed(24, 64, 4, 32, offsets=True)
    parts = [x.numpy() if as_numpy else x for x in (m.codes, m.scales, m.offsets)]
    weight = pack_weight(*parts, m.zero, m.bits, m.group)
    assert weight.shape == (24, 64)
    assert 0 < weight.nbytes <= 24 * 64
    expected = reference.dequantize(m)
    for row in (0, 7, 23):
        np.testing.assert_allclose(weight.row(row), expected[row].numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="row"):
        weight.row(24)


def test_strided_and_half_memory_is_converted() -> None:
    values = torch.randn(32, 48).half()
    weight = dense_weight(values.T)
    np.testing.assert_array_equal(weight.row(5), values[:, 5].float().numpy())


def test_wrong_shapes_are_refused() -> None:
    m = random_packed(24, 64, 4, 32, offsets=True)
    with pytest.raises(ValueError, match="groups"):
        pack_weight(m.codes, m.scales[:, :1], m.offsets, m.zero, m.bits, m.group)
    with pytest.raises(ValueError, match="groups"):
        pack_weight(m.codes, m.scales, m.offsets[:3], m.zero, m.bits, m.group)
    with pytest.raises(ValueError, match="bits"):
        pack_weight(m.codes, m.scales, m.offsets, m.zero, 3, m.group)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_ggml_blocks_unpack_to_what_gguf_reads(kind: str) -> None:
    type_number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((37, 512)).astype(np.float32)
    blocks = gguf.quants.quantize(values, type_number)
    codes, scales, offsets, zero, _, group = ggml_unpack(int(type_number), blocks.tobytes(), 37, 512)
    grouped = (codes.astype(np.float32) - zero).reshape(37, -1, group) * scales[:, :, None]
    if offsets is not None:
        grouped += offsets[:, :, None]
    expected = gguf.quants.dequantize(blocks, type_number)
    np.testing.assert_allclose(grouped.reshape(37, 512), expected, rtol=1e-6, atol=1e-6)


def test_ggml_refusals() -> None:
    with pytest.raises(ValueError, match="reader"):
        ggml_unpack(0, b"", 1, 32)
    with pytest.raises(ValueError, match="bytes"):
        ggml_unpack(2, bytes(17), 1, 32)
    assert native.ggml_supported(2)
    assert not native.ggml_supported(0)


def test_set_threads() -> None:
    assert native.set_threads(3) == 3
    assert native.set_threads(0) >= 1
