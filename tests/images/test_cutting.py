"""Tiles, sizes and token counts are transformers': its processors' arrays, from the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from tests.images.pictures import picture
from textmill.images.cutting import CannotCut, Part, cut
from textmill.images.grids import best_grid, patch_tokens
from textmill.images.recipe import BICUBIC, BILINEAR, CLIP_MEAN, CLIP_STD, HALF, Recipe

SHAPES = [(40, 70), (70, 40), (28, 28), (200, 31), (31, 200), (5, 3), (1, 60), (57, 58)]
CHOICES = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
GRID = Recipe("grid", CLIP_MEAN, CLIP_STD, BICUBIC, side=28, patch=7, choices=tuple(map(tuple, CHOICES)))
SPLIT = Recipe("split", HALF, HALF, BILINEAR, shortest=20, longest=61, splits=True, tokens=4)
SQUARE = Recipe("square", CLIP_MEAN, CLIP_STD, BICUBIC, side=28, tokens=1)


def normalised(part: Part, recipe: Recipe) -> Any:
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (recipe.mean, recipe.std))
    return (part.pixels.astype(np.float32) / 255 - mean) / std


@pytest.mark.parametrize("shape", SHAPES)
def test_grid(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=CHOICES
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    [part] = cut(image, GRID)
    np.testing.assert_allclose(normalised(part, GRID), expected, atol=1e-6)
    assert part.size == shape


def test_tokens_of_a_grid_are_counted_as_transformers_does_for_every_shape() -> None:
    class Counter:
        image_processor = type("P", (), {"image_grid_pinpoints": CHOICES})
        patch_size, num_additional_image_tokens = 7, 0
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

    for height in range(1, 260, 7):
        for width in range(1, 260, 5):
            expected = LlavaNextProcessor._get_number_of_features(Counter(), height, width, 28, 28)  # type: ignore[arg-type]
            assert patch_tokens((height, width), CHOICES, 28, 7) == expected, (height, width)


def test_the_first_of_equal_grids_is_taken() -> None:
    assert best_grid((28, 28), [[56, 28], [28, 56]]) == (56, 28)


@pytest.mark.parametrize("shape", [one for one in SHAPES if min(one) > 1])
def test_split(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": 20, "longest_edge": 61}, do_image_splitting=True, image_mean=HALF, image_std=HALF
    )
    found = processor(image, return_tensors="np")
    parts = cut(image, SPLIT)
    assert len(parts) == 5
    for part, pixels, mask in zip(parts, found["pixel_values"][0], found["pixel_attention_mask"][0], strict=True):
        _, _, height, width = part.pixels.shape
        assert mask.sum() == height * width == mask[:height, :width].sum()
        np.testing.assert_allclose(normalised(part, SPLIT)[0], pixels[:, :height, :width], atol=1e-6)


def test_a_line_cannot_be_split() -> None:
    with pytest.raises(CannotCut, match="1 x 60 pixels cannot be split"):
        cut(picture(1, 60), SPLIT)


@pytest.mark.parametrize("shape", SHAPES)
def test_square(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    processor = IdeficsImageProcessorPil(image_size=28, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    expected = np.asarray(processor(image, return_tensors="np"))
    [part] = cut(image, SQUARE)
    np.testing.assert_allclose(normalised(part, SQUARE), expected, atol=1e-6)
