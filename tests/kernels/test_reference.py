"""The references themselves, against torch's own functions and arithmetic written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.tiny import random_packed, rope
from textmill.kernels import reference
from textmill.kernels.spec import AttentionSpec


def test_attention_is_torchs_over_the_whole_past() -> None:
    torch.manual_seed(0)
    cos, sin = rope(16, 64)
    spec = AttentionSpec(4, 2, 16, 0.25, rope_cos=cos, rope_sin=sin)
    qkv = torch.randn(50, 8 * 16)
    q, k, v = reference.split_qkv(qkv, torch.arange(50), spec)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1).repeat_interleave(2, 0), v.transpose(0, 1).repeat_interleave(2, 0),
        is_causal=True, scale=0.25,
    ).transpose(0, 1).flatten(1)  # fmt: skip
    keys, values = torch.zeros(8, 2, 16, 16), torch.zeros(8, 2, 16, 16)
    table = torch.tensor([[5, 2, 7, 0], [1, 3, 4, 6]])
    parts = [
        reference.attend(qkv[start:stop], keys, values, table, [(1, start, stop - start)], spec)
        for start, stop in ((0, 7), (7, 40), (40, 41), (41, 50))
    ]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)


def test_turning_keeps_angles_between_positions() -> None:
    cos, sin = rope(8, 100)
    x, y = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    for interleaved in (False, True):
        dots = [
            (
                reference.rotate(x, torch.tensor([i]), cos, sin, interleaved)
                * reference.rotate(y, torch.tensor([i + 3]), cos, sin, interleaved)
            ).sum()
            for i in (0, 11, 90)
        ]
        assert dots[0] == pytest.approx(dots[1].item(), abs=1e-4)
        assert dots[0] == pytest.approx(dots[2].item(), abs=1e-4)


@pytest.mark.parametrize(("k", "group"), [(64, 32), (64, 16), (96, 96), (48, 16)])
def test_packed_products_are_close_to_the_float_product(k: int, group: int) -> None:
    torch.manual_seed(1)
    matrix = random_packed(40, k, 4, group, offsets=True)
    x = torch.randn(5, k)
    exact = x @ reference.dequantize(matrix).T
    assert (reference.matmul(x, matrix) - exact).abs().max() < 0.02 * exact.abs().max()
    by_hand = matrix.scales[3, 0] * (matrix.codes[3, 1].float() - matrix.zero) + matrix.offsets[3, 0]
    assert reference.dequantize(matrix)[3, 1] == by_hand


def test_quantized_rows_are_their_own_business() -> None:
    x = torch.randn(3, 70)
    x[1] = 0
    codes, scales = reference.quantize_rows(x)
    assert codes.shape == (3, 3, 32)
    assert scales[1].eq(0).all()
    assert codes.abs().max() == 127
    back = (codes * scales.unsqueeze(-1)).flatten(1)[:, :70]
    assert (back - x).abs().max() <= x.abs().max() / 254 + 1e-6
    assert torch.equal(reference.quantize_rows(x[2:])[0], codes[2:])


def test_gated_products() -> None:
    x, w, bias = torch.randn(3, 8), torch.randn(12, 8), torch.randn(12)
    y = x @ w.T + bias
    expected = F.silu(y[:, :6]) * y[:, 6:]
    torch.testing.assert_close(reference.matmul(x, w, bias=bias, activation="silu", gated=True), expected)
    torch.testing.assert_close(reference.matmul(x, w, gated=True), (x @ w.T)[:, :6] * (x @ w.T)[:, 6:])
