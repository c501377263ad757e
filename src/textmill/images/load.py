"""From a model's files to what a router needs to show it pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from textmill.config import Settings
from textmill.errors import ModelError
from textmill.images.recipe import recipe_of
from textmill.weights.config import read_json

if TYPE_CHECKING:
    from textmill.images.prompt import Sight

IMAGE_TOKEN = "<image>"


class Vocabulary(Protocol):
    def token_to_id(self, token: str, /) -> int | None: ...

    def id_to_token(self, id: int, /) -> str | None: ...  # noqa: A002 - the library's own name


def load_sight(folder: Path, vocabulary: Vocabulary, settings: Settings, end: str | None = None) -> Sight | None:
    """None for a model that sees nothing. `end`: the text of the token that ends texts.

    Raises ModelError for a model whose files do not say how it sees.
    """
    if not (folder / "config.json").is_file():
        return None
    recipe = recipe_of(folder, read_json(folder / "config.json"), processor_files(folder))
    if recipe is None:
        return None
    token_id = vocabulary.token_to_id(IMAGE_TOKEN) if recipe.image_token is None else recipe.image_token
    token = None if token_id is None else vocabulary.id_to_token(token_id)
    if token is None or token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no token that stands for images")
    from textmill.images.address import hosts  # routers of models that see nothing start without all this
    from textmill.images.decoder import Decoder
    from textmill.images.fetch import Fetcher
    from textmill.images.limits import MOST_BYTES
    from textmill.images.prompt import Sight

    fetcher = Fetcher(hosts(settings.allow_remote_images), settings.max_image_fetch_size)
    end_id = None if end is None else vocabulary.token_to_id(end)
    decoder = Decoder(recipe, most_bytes=max(MOST_BYTES, settings.max_image_fetch_size))
    return Sight(recipe, token, token_id, decoder, fetcher, end_id)


def processor_files(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, or what newer files hold in processor_config.json."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            fields = read_json(folder / name)
            inner = fields.get("image_processor")
            found |= fields | (inner if isinstance(inner, dict) else {})
    return found
