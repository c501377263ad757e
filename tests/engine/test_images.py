"""Images as the engine sees them: what is refused before it reaches a model, what keeps them apart in the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from textmill.core import Image, Request
from textmill.engine.admission import refusal
from textmill.engine.prefix import pictures_between

GOOD = Image(2, 3, bytes(12), (1, 3, 2, 2), (20, 30), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), b"one")


def reason(*images: Image, sees: bool = True) -> str:
    return refusal(Request(1, tuple(range(10)), 4, images=images), 100, 50, sees=sees)


def test_good_ones() -> None:
    assert reason(GOOD, replace(GOOD, start=5, count=5)) == ""
    assert reason(sees=False) == ""


def test_models_that_see_nothing() -> None:
    assert reason(GOOD, sees=False) == "the model takes no images"


@pytest.mark.parametrize(
    "changes",
    [{"start": 8}, {"count": 0}, {"start": 100}],
)
def test_places_outside_the_prompt(changes: dict[str, Any]) -> None:
    assert "overlap, or lie outside" in reason(replace(GOOD, **changes))


def test_places_that_overlap_or_are_not_in_order() -> None:
    assert "overlap, or lie outside" in reason(GOOD, replace(GOOD, start=4))
    assert "overlap, or lie outside" in reason(replace(GOOD, start=6), GOOD)


@pytest.mark.parametrize(
    "changes",
    [
        {"pixels": bytes(11)},
        {"pixels": b"", "shape": (0, 3, 2, 2)},
        {"shape": (3, 2, 2)},
        {"shape": (1, 4, 3, 1)},
        {"size": (0, 30)},
        {"size": (20,)},
        {"mean": ()},
        {"std": (0.3, 0.0, 0.3)},
        {"std": (0.3, 0.3)},
    ],
)
def test_shapes_and_scales_that_make_no_sense(changes: dict[str, Any]) -> None:
    assert "image" in reason(replace(GOOD, **changes))


def test_a_block_is_named_by_the_parts_of_images_in_it() -> None:
    images = (replace(GOOD, start=10, count=30), replace(GOOD, start=50, count=2, digest=b"two"))
    assert pictures_between(images, 0, 10) == pictures_between(images, 40, 50) == b""
    names = [pictures_between(images, start, start + 16) for start in (0, 16, 32, 48)]
    assert len(set(names)) == 4
    assert b"one" in names[1]
    assert b"two" in names[3]
    moved = (replace(images[0], start=9), images[1])
    assert pictures_between(moved, 16, 32) != names[1]
