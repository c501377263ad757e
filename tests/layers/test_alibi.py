"""ALiBi's slopes and biases equal transformers', for any number of heads and in its odd roundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_tensor

from textmill.layers.positions import alibi_key_bias, alibi_slopes, alibi_slopes_of_next_power

HEADS = [1, 2, 3, 4, 6, 8, 12, 16, 32, 40, 64, 71, 112]


@pytest.mark.parametrize("heads", HEADS)
def test_slopes(heads: int) -> None:
    expected = bloom_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6)


@pytest.mark.parametrize("largest", [8.0, 16.0])
@pytest.mark.parametrize("heads", HEADS)
def test_slopes_of_the_next_power(heads: int, largest: float) -> None:
    expected = -mpt_tensor(heads, 2, largest)[:, 0, 0]  # of a key one token back
    np.testing.assert_allclose(alibi_slopes_of_next_power(heads, largest), expected, rtol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_biases_of_keys_are_rounded_as_in_training(heads: int) -> None:
    """To the last bit: a slope that rounds another way would be another model."""
    expected = falcon_tensor(torch.ones(1, 2048, dtype=torch.long), heads, torch.float32)[:, 0] * 64**-0.5
    np.testing.assert_array_equal(alibi_key_bias(heads, 2048, 64), expected.numpy())
