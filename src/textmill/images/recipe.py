"""How a model wants its pictures: read from the files beside its weights, plain data that processes can pass on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from textmill.errors import ModelError
from textmill.images.grids import grid_choices

LARGEST_SIDE = 8192
MOST_TOKENS = 4096
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers, which configs use
FAKE = "<fake_token_around_image>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """`cut` is how a picture becomes tiles: see `images.cutting`; each cut reads the fields that it needs.

    `around` is the text on both sides of a tile's tokens (once where two tiles meet). `tokens`: how many tokens stand
    for a tile; 0: they follow from the picture's size. `image_token`: its id, None if only the tokenizer knows it.
    """

    cut: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int
    side: int = 0  # of a tile, in pixels
    patch: int = 0
    choices: tuple[tuple[int, int], ...] = ()  # resolutions (height, width)
    shortest: int = 0
    longest: int = 0
    splits: bool = False
    tokens: int = 0
    around: str = ""
    strips: bool = False  # spaces beside pictures are not the model's
    image_token: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Recipe:
        return Recipe(**{name: _frozen(value) for name, value in json.loads(text).items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


def recipe_of(folder: Path, config: dict[str, Any], files: dict[str, Any]) -> Recipe | None:
    """The recipe of a model by its config.json; None for models that see nothing.

    `files`: preprocessor_config.json and processor_config.json, merged. Raises ModelError.
    """
    make = FAMILIES.get(str(config.get("model_type")))
    try:
        return None if make is None else make(config, files)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: the config of its image processor makes no sense: {error}") from error


def _llava_next(config: dict[str, Any], files: dict[str, Any]) -> Recipe:
    vision = config.get("vision_config") or {}
    side = _number(vision.get("image_size", 336), LARGEST_SIDE)
    size, crop = files.get("size") or {}, files.get("crop_size") or {}
    edges = {size.get("shortest_edge", size.get("height", side)), crop.get("height", side), crop.get("width", side)}
    if edges != {side}:
        raise ValueError(f"size and crop_size must be the tower's {side} pixels")
    choices = grid_choices(files if files.get("image_grid_pinpoints") else config)
    return Recipe(
        cut="grid",
        mean=_three(files.get("image_mean", CLIP_MEAN)),
        std=_three(files.get("image_std", CLIP_STD)),
        resample=_filter(files, BICUBIC),
        side=side,
        patch=_number(vision.get("patch_size", 14), side),
        choices=tuple((one[0], one[1]) for one in choices),
        image_token=config.get("image_token_index", config.get("image_token_id", 32000)),
    )


def _idefics2(config: dict[str, Any], files: dict[str, Any]) -> Recipe:
    size = files.get("size") or {"shortest_edge": 378, "longest_edge": 980}
    latents = (config.get("perceiver_config") or {}).get("resampler_n_latents", 64)
    return Recipe(
        cut="split",
        mean=_three(files.get("image_mean", HALF)),
        std=_three(files.get("image_std", HALF)),
        resample=_filter(files, BILINEAR),
        shortest=_number(size["shortest_edge"], LARGEST_SIDE),
        longest=_number(size["longest_edge"], LARGEST_SIDE),
        splits=bool(files.get("do_image_splitting", False)),
        tokens=_number(latents, MOST_TOKENS),
        around=FAKE,
        image_token=config.get("image_token_id", 32001),
    )


def _idefics(config: dict[str, Any], files: dict[str, Any]) -> Recipe:
    vision = config.get("vision_config") or {}
    size = files.get("size") or {}
    side = size.get("height", files.get("image_size", vision.get("image_size", 224)))
    return Recipe(
        cut="square",
        mean=_three(files.get("image_mean", CLIP_MEAN)),
        std=_three(files.get("image_std", CLIP_STD)),
        resample=_filter(files, BICUBIC),
        side=_number(side, LARGEST_SIDE),
        tokens=1,
        around=FAKE,
        strips=True,
    )


FAMILIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Recipe]] = {
    "llava_next": _llava_next,
    "idefics2": _idefics2,
    "idefics": _idefics,
}


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{value!r} is not a number from 1 to {most}")
    return value


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _filter(files: dict[str, Any], default: int) -> int:
    value = files.get("resample", default)
    if type(value) is not int or not 0 <= value <= 5:
        raise ValueError(f"resample: {value!r} is not one of Pillow's filters")
    return value
