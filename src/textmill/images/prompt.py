"""A prompt with pictures: finds them, has them decoded, and puts the model's own tokens in their places."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from textmill.core import Image
from textmill.errors import InvalidRequest
from textmill.images.address import shortened
from textmill.images.decoder import Decoder, Tiles
from textmill.images.fetch import Fetcher
from textmill.images.limits import MOST_BYTES, MOST_IMAGES, MOST_PREPARED_BYTES, REQUEST_SECONDS
from textmill.images.recipe import Recipe

MARKDOWN = re.compile(r"!\[\]\(([^)]*)\)")
DATA = "data:"


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt whose pictures have become image tokens, and what these stand for, in order."""

    text: str
    tiles: tuple[Tiles, ...] = ()


class Sight:
    """What a router needs for a model that sees. `token` is the image token's text, `token_id` its number.

    `end_id`: the token that ends texts, behind which an earlier image is not seen (where `recipe.strips`).
    """

    def __init__(
        self,
        recipe: Recipe,
        token: str,
        token_id: int,
        decoder: Decoder,
        fetcher: Fetcher,
        end_id: int | None = None,
        seconds: float = REQUEST_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._end_id = end_id if recipe.strips else None
        self.recipe = recipe
        self.token = token
        self.token_id = token_id
        self._decoder = decoder
        self._fetcher = fetcher

    async def look(self, text: str) -> Shown:
        """Fetches and decodes the pictures of a prompt. Raises InvalidRequest."""
        pieces = MARKDOWN.split(text)
        addresses = pieces[1::2]
        if len(addresses) > MOST_IMAGES:
            raise InvalidRequest(f"`inputs` has {len(addresses)} images: the limit is {MOST_IMAGES}")
        if not addresses:
            return Shown(text)
        try:
            async with asyncio.timeout(self._seconds):
                return await self._shown(pieces)
        except TimeoutError:
            raise InvalidRequest(f"the images of `inputs` took longer than {self._seconds:g} s") from None

    async def _shown(self, pieces: list[str]) -> Shown:
        """Of text, address, text, address, ..., text."""
        addresses = pieces[1::2]
        tiles: list[Tiles] = []
        words = [pieces[0]]
        for number, (address, following) in enumerate(zip(addresses, pieces[2::2], strict=True), 1):
            name = f"image {number} of `inputs` ({shortened(address)})"
            found = await self._decoder.tiles(name, await self._bytes(name, address))
            tiles += found
            if sum(len(one.pixels) for one in tiles) > MOST_PREPARED_BYTES:
                raise InvalidRequest(f"the images of `inputs` take more than {MOST_PREPARED_BYTES} bytes when prepared")
            words += [placeholder(found, self.recipe.around, self.token), following]
        return Shown(joined(words, self.recipe), tuple(tiles))

    def place(self, shown: Shown, ids: Sequence[int]) -> tuple[Image, ...]:
        """The images with their places among the prompt's tokens. InvalidRequest if the text has image tokens too."""
        places = [place for place, one in enumerate(ids) if one == self.token_id]
        if len(places) != sum(one.tokens for one in shown.tiles):
            raise InvalidRequest(f"`inputs` must not have {self.token} in its text: it stands for images")
        ends = [place for place, one in enumerate(ids, 1) if one == self._end_id]
        images, at = [], 0
        for one in shown.tiles:
            until = next((end for end in ends if end > places[at]), 0)
            images.append(image_at(places[at], one, self.recipe, until))
            at += one.tokens
        return tuple(images)

    def after_truncation(self, images: Sequence[Image], dropped: int) -> tuple[Image, ...]:
        """The images of a prompt that lost its first tokens; InvalidRequest if the cut goes through one."""
        kept = [
            replace(one, start=one.start - dropped, until=max(one.until - dropped, 0))
            for one in images
            if one.start + one.count > dropped
        ]
        if any(one.start < 0 for one in kept):
            raise InvalidRequest("`truncate` must not cut through an image")
        return tuple(kept)

    async def close(self) -> None:
        await self._decoder.close()

    async def _bytes(self, name: str, address: str) -> bytes:
        if address.startswith(("http://", "https://")):
            return await self._fetcher.fetch(address)
        if address.startswith(DATA):
            return data_of(name, address)
        raise InvalidRequest(f"invalid image content: {name} is neither a data URL nor an http(s) address")


def data_of(name: str, address: str) -> bytes:
    """The bytes in a data URL, which must be base64. The type it names is not believed: the bytes tell."""
    head, comma, body = address[len(DATA) :].partition(",")
    if not comma or head.count(";") != 1 or not head.endswith(";base64"):
        raise InvalidRequest(f"invalid image content: {name} is not of the form data:image/png;base64,…")
    if len(body) > 4 * MOST_BYTES // 3 + 4:
        raise InvalidRequest(
            f"invalid image: Image size {3 * len(body) // 4} bytes exceeds maximum allowed size of {MOST_BYTES} bytes: "
            f"{name}"
        )
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"base64 encoding is invalid: {name}: {error}") from None


def placeholder(tiles: Sequence[Tiles], around: str, token: str) -> str:
    """The text that the tokenizer turns into a picture's tokens."""
    return "".join(around + token * one.tokens + around for one in tiles)


def joined(words: list[str], recipe: Recipe) -> str:
    """Texts and placeholders, in turn; the token around pictures stands only once between two of them."""
    if recipe.strips:
        return stripped(words, recipe.around)
    text = "".join(words)
    if not recipe.around:
        return text
    text = text.replace(2 * recipe.around, recipe.around)
    return re.sub(rf"{re.escape(recipe.around)}(?=[^\s<])", f"{recipe.around} ", text)


def stripped(words: list[str], around: str) -> str:
    """Every text without the spaces at its ends; even one of nothing but spaces keeps two pictures apart."""
    done, beside_picture = "", False
    for number, word in enumerate(words):
        if number % 2:
            done += word.removeprefix(around) if beside_picture else word
        elif word:
            done += word.strip(" ")
        beside_picture = bool(number % 2) or (beside_picture and not word)
    return done


def image_at(start: int, tiles: Tiles, recipe: Recipe, until: int) -> Image:
    return Image(
        start=start,
        count=tiles.tokens,
        pixels=tiles.pixels,
        shape=tiles.shape,
        size=tiles.size,
        mean=recipe.mean,
        std=recipe.std,
        digest=tiles.digest,
        until=until,
    )
