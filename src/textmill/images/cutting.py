"""From a picture to the tiles that a tower reads, as transformers' processors do it with Pillow; bytes, not floats.

Every cut gives parts: uint8 arrays [tiles, 3, height, width], each with the size that stands for it and its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from textmill.images.grids import Size, best_grid, fitted, patch_tokens
from textmill.images.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Pixels = NDArray[np.uint8]


class CannotCut(ValueError):
    """The picture does not suit the model; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Part:
    """What stands in the prompt as one run of `tokens` image tokens. `size`: (height, width) of its picture."""

    pixels: Pixels
    size: Size
    tokens: int


def cut(picture: Picture, recipe: Recipe) -> list[Part]:
    """The parts of an RGB picture, in the order of their tokens."""
    return CUTS[recipe.cut](picture, recipe)


def grid(picture: Picture, recipe: Recipe) -> list[Part]:
    """The whole in one tile, then the tiles of the best resolution, in whose middle the picture lies on black."""
    size = (picture.height, picture.width)
    target = best_grid(size, recipe.choices)
    inner = resized(picture, fitted(size, target), recipe.resample)
    canvas = np.zeros((3, *target), np.uint8)
    top, left = (target[0] - inner.shape[1]) // 2, (target[1] - inner.shape[2]) // 2
    canvas[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    side = recipe.side
    tiles = [resized(picture, (side, side), recipe.resample)]
    for row in range(0, target[0], side):
        tiles += [canvas[:, row : row + side, column : column + side] for column in range(0, target[1], side)]
    return [Part(np.stack(tiles), size, patch_tokens(size, recipe.choices, side, recipe.patch))]


def split(picture: Picture, recipe: Recipe) -> list[Part]:
    """The four quarters and the whole, or the whole alone, each of its own shape."""
    height, width = picture.height, picture.width
    boxes = [(0, 0, width, height)]
    if recipe.splits:
        x, y = width // 2, height // 2
        if not x or not y:
            raise CannotCut(f"a picture of {height} x {width} pixels cannot be split into quarters")
        boxes = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height), *boxes]
    parts = []
    for box in boxes:
        piece = picture.crop(box)
        size = bounded((piece.height, piece.width), recipe)
        pixels = resized(piece, size, recipe.resample)
        parts.append(Part(pixels[None], size, recipe.tokens))
    return parts


def bounded(size: Size, recipe: Recipe) -> Size:
    """No side longer than `longest` with the proportions kept, then none shorter than `shortest` at any price."""
    height, width = size
    proportion = width / height
    if width >= height and width > recipe.longest:
        width = recipe.longest
        height = int(width / proportion)
    elif height > width and height > recipe.longest:
        height = recipe.longest
        width = int(height * proportion)
    return max(height, recipe.shortest), max(width, recipe.shortest)


def square(picture: Picture, recipe: Recipe) -> list[Part]:
    """One tile, whatever the proportions were."""
    pixels = resized(picture, (recipe.side, recipe.side), recipe.resample)
    return [Part(pixels[None], (picture.height, picture.width), recipe.tokens)]


def resized(picture: Picture, size: Size, resample: int) -> Pixels:
    """[3, height, width]."""
    scaled: Any = picture.resize((size[1], size[0]), resample=resample)
    return np.ascontiguousarray(np.asarray(scaled, np.uint8).transpose(2, 0, 1))


CUTS: dict[str, Callable[[Picture, Recipe], list[Part]]] = {"grid": grid, "split": split, "square": square}
