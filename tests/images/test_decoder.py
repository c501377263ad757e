"""What strangers send: sizes are read from headers, the rest happens in a process that may end."""

from __future__ import annotations

import signal
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.images.pictures import encoded, picture, png_of
from textmill.errors import InvalidRequest
from textmill.images.cutting import cut
from textmill.images.decoder import Decoder, accepted
from textmill.images.header import Header, read_header
from textmill.images.recipe import BICUBIC, CLIP_MEAN, CLIP_STD, Recipe

SQUARE = Recipe("square", CLIP_MEAN, CLIP_STD, BICUBIC, side=28, tokens=1)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(500)}), ("GIF", {}),
    ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif\0\0" + bytes(20)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_headers(kind: str, options: dict[str, Any]) -> None:
    data = encoded(picture(31, 57), kind, **options)
    assert read_header(data) == Header(kind, 31, 57)
    for cut_off in range(10):
        assert read_header(data[:cut_off]) is None


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "JPEG2000", "ICO"])
def test_other_formats_are_not_opened(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid image: x is no PNG, JPEG, GIF or WebP"):
        accepted("x", encoded(picture(16, 16), kind))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no PNG"),
        (b"<svg/>", "is no PNG"),
        (png_of(65_535, 65_535), "65535 x 65535 pixels: the limit is 33554432 pixels"),
        (png_of(2**31, 1), "the limit is 33554432 pixels"),
        (png_of(0, 5), "it must have some"),
        (b"GIF89a\xff\xff\xff\xff" + bytes(100), "65535 x 65535 pixels"),
        (bytes(21 << 20), r"Image size 22020096 bytes exceeds maximum allowed size of 20971520 bytes"),
    ],
)
async def test_nothing_is_decoded_of_what_the_header_forbids(data: bytes, words: str) -> None:
    decoder = Decoder(SQUARE)
    with pytest.raises(InvalidRequest, match=words):
        await decoder.tiles("x", data)
    assert decoder._process is None


async def test_pictures_and_broken_ones_through_one_process() -> None:
    decoder = Decoder(SQUARE)
    image = picture(40, 50)
    data = encoded(image)
    try:
        [tiles] = await decoder.tiles("x", data)
        process = decoder._process
        [expected] = cut(image, SQUARE)
        assert tiles.pixels == expected.pixels.tobytes()
        assert (tiles.shape, tiles.size, tiles.tokens) == ((1, 3, 28, 28), (40, 50), 1)
        bomb = png_of(5000, 5000, zlib.compress(bytes(1 << 20)))  # less than it says
        for broken in (data[: len(data) // 2], png_of(40, 50, b"nonsense"), bomb, encoded(image, "JPEG")[:200]):
            with pytest.raises(InvalidRequest, match=r"invalid image: y: it is broken or cut off"):
                await decoder.tiles("y", broken)
        [again] = await decoder.tiles("x", data)
        assert again == tiles
        assert decoder._process is process
    finally:
        await decoder.close()


async def test_upright_first_frame_without_transparency() -> None:
    decoder = Decoder(SQUARE)
    image = picture(40, 50)
    turned = image.getexif()
    turned[0x112] = 6  # the camera was held on its side
    see_through = image.convert("RGBA")
    see_through.putalpha(3)
    frames = [image.quantize(), Image.new("P", image.size)]
    sources = {
        "turned": (encoded(image, exif=turned), image.transpose(Image.Transpose.ROTATE_270)),
        "see-through": (encoded(see_through), image),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0].convert("RGB")),
        "grey": (encoded(image.convert("L")), image.convert("L").convert("RGB")),
    }
    try:
        for name, (data, expected) in sources.items():
            [tiles] = await decoder.tiles(name, data)
            assert tiles.pixels == cut(expected, SQUARE)[0].pixels.tobytes(), name
            assert tiles.size == (expected.height, expected.width)
    finally:
        await decoder.close()


async def test_equal_bytes_of_another_shape_are_another_picture() -> None:
    decoder = Decoder(SQUARE)
    try:
        flat = [await decoder.tiles("x", encoded(Image.new("RGB", size, "red"))) for size in ((40, 50), (50, 40))]
    finally:
        await decoder.close()
    assert flat[0][0].pixels == flat[1][0].pixels
    assert flat[0][0].digest != flat[1][0].digest


async def test_a_decoder_that_takes_too_long_or_dies_is_replaced() -> None:
    decoder = Decoder(SQUARE)
    data = encoded(picture(30, 30))
    try:
        [tiles] = await decoder.tiles("x", data)
        assert decoder._process is not None
        decoder._process.send_signal(signal.SIGSTOP)
        decoder._seconds = 0.3
        with pytest.raises(InvalidRequest, match=r"x took longer than 0\.3 s to decode"):
            await decoder.tiles("x", data)
        decoder._seconds = 15.0
        assert await decoder.tiles("x", data) == [tiles]
        decoder._process.send_signal(signal.SIGKILL)
        assert await decoder.tiles("x", data) == [tiles]
    finally:
        await decoder.close()


async def test_a_decoder_that_dies_of_every_picture_is_the_pictures_fault() -> None:
    decoder = Decoder(SQUARE)
    decoder._recipe = "{"  # its process ends with an error as soon as it starts
    try:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=r"x cannot be decoded \(its decoder ended\)"):
                await decoder.tiles("x", encoded(picture(30, 30)))
    finally:
        await decoder.close()


def test_numpy_is_the_pixels_order() -> None:
    [part] = cut(picture(28, 28), SQUARE)
    assert part.pixels.dtype == np.uint8
