"""The grid of tiles that a picture is cut into: integer arithmetic that the processor and the model must share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from textmill.errors import ModelError

Size = tuple[int, int]
"""(height, width)."""

DEFAULT_CHOICES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MOST_CHOICES = 64
LARGEST_SIDE = 8192


def best_grid(size: Size, choices: Sequence[Sequence[int]]) -> Size:
    """The resolution that keeps most of a picture, and wastes least of itself; the first among equals."""
    height, width = size
    scores = []
    for high, wide in choices:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        scores.append((kept, kept - high * wide))
    best = choices[scores.index(max(scores))]
    return best[0], best[1]


def fitted(size: Size, target: Size) -> Size:
    """The picture's size when it is scaled to lie just inside the target."""
    across, down = target[1] / size[1], target[0] / size[0]
    if across < down:
        return min(math.ceil(size[0] * across), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * down), target[1])


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """The rows and columns of a grid of patches that are not padding around a picture of `size`."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(margin, rows - margin), slice(0, columns)
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(margin, columns - margin)


def patch_tokens(size: Size, choices: Sequence[Sequence[int]], side: int, patch: int) -> int:
    """Tokens that stand for a picture: its whole in one tile, then the grid without padding, a newline to each row."""
    per_tile = side // patch
    high, wide = best_grid(size, choices)
    rows, columns = unpadded(size, (high // side * per_tile, wide // side * per_tile))
    height: int = rows.stop - rows.start
    width: int = columns.stop - columns.start
    return per_tile * per_tile + height * (width + 1)


def grid_choices(config: Mapping[str, Any]) -> list[list[int]]:
    """A config's resolutions, checked: whole numbers of sane size. ModelError otherwise."""
    choices = config.get("image_grid_pinpoints", DEFAULT_CHOICES)
    if isinstance(choices, list) and choices and len(choices) <= MOST_CHOICES:
        sizes = [one for one in choices if isinstance(one, list) and len(one) == 2]
        numbers = [number for one in sizes for number in one]
        if len(sizes) == len(choices) and all(type(n) is int and 0 < n <= LARGEST_SIDE for n in numbers):
            return choices
    raise ModelError("image_grid_pinpoints must be a list of [height, width]")
