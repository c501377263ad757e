"""Prompts with pictures become transformers' tokens, with every picture in transformers' places."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import (
    Idefics2Processor,
    IdeficsProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.images.pictures import encoded, picture
from textmill.config import Settings
from textmill.core import Image
from textmill.errors import InvalidRequest, ModelError
from textmill.images.load import load_sight
from textmill.images.prompt import Sight
from textmill.images.recipe import FAKE

CHOICES = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SPECIAL = ["<s>", "</s>", "<image>", FAKE, "<end_of_utterance>"]
VISION = {"image_size": 28, "patch_size": 7}
Piece = str | tuple[int, int, int]
PROMPTS: list[list[Piece]] = [
    ["see ", (40, 70, 1), " here"],
    [(31, 30, 2), "at once"],
    ["two ", (40, 40, 3), (28, 57, 4), "."],
    ["apart ", (40, 40, 3), " ", (28, 57, 4), " end "],
    ["first ", (40, 40, 3), "</s> then", (28, 57, 4), "x</s>y"],
    ["no picture"],
]


class Model:
    """A folder with the files of a family's processor, and the processor."""

    def __init__(self, folder: Path, config: dict[str, Any], processor: Any) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps(config))
        processor.save_pretrained(folder)
        self.folder, self.processor = folder, processor

    def sight(self) -> Sight:
        found = load_sight(self.folder, self.tokenizer, Settings(), "</s>")
        assert found is not None
        return found


def words(folder: Path) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(n): n - 32 for n in range(32, 127)}, []))
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=SPECIAL[2:], **ends)


def llava_next(folder: Path) -> Model:
    size = {"height": 28, "width": 28}
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=CHOICES)
    processor = LlavaNextProcessor(
        pictures, words(folder), patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return Model(folder, {"model_type": "llava_next", "vision_config": VISION, "image_token_index": token}, processor)


def idefics2(folder: Path) -> Model:
    pictures = Idefics2ImageProcessorPil(
        size={"shortest_edge": 20, "longest_edge": 61},
        do_image_splitting=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = Idefics2Processor(pictures, words(folder), image_seq_len=4)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    perceiver = {"resampler_n_latents": 4}
    return Model(folder, {"model_type": "idefics2", "perceiver_config": perceiver, "image_token_id": token}, processor)


def idefics(folder: Path) -> Model:
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), words(folder), image_size=28)
    return Model(folder, {"model_type": "idefics", "vision_config": VISION}, processor)


def markdown(pieces: Sequence[Piece]) -> str:
    def text(piece: Piece) -> str:
        if isinstance(piece, str):
            return piece
        return f"![](data:image/png;base64,{base64.b64encode(encoded(picture(*piece))).decode()})"

    return "".join(map(text, pieces))


async def seen(sight: Sight, tokenizer: tokenizers.Tokenizer, text: str) -> tuple[list[int], tuple[Image, ...]]:
    shown = await sight.look(text)
    ids: list[int] = tokenizer.encode(shown.text, add_special_tokens=False).ids
    return ids, sight.place(shown, ids)


@pytest.mark.parametrize("make", [llava_next, idefics2])
async def test_tokens_and_pixels(tmp_path: Path, make: Any) -> None:
    model = make(tmp_path)
    sight = model.sight()
    try:
        for pieces in PROMPTS:
            ids, images = await seen(sight, model.tokenizer, markdown(pieces))
            text = "".join(piece if isinstance(piece, str) else "<image>" for piece in pieces)
            pictures = [picture(*piece) for piece in pieces if not isinstance(piece, str)]
            expected = model.processor(text=text, images=pictures or None, return_tensors="np")
            assert ids == expected["input_ids"][0].tolist(), pieces
            assert sum(image.count for image in images) == ids.count(sight.token_id)
            assert all(set(ids[one.start : one.start + one.count]) == {sight.token_id} for one in images)
            if images:
                check_pixels(images, expected["pixel_values"])
    finally:
        await sight.close()


def check_pixels(images: Sequence[Image], expected: Any) -> None:
    """Tiles or pieces of all pictures, as far as they are not padding."""
    flat = expected.reshape(-1, *expected.shape[-3:]) if len(images) != len(expected) else expected
    for image, values in zip(images, flat, strict=True):
        tiles, _, height, width = image.shape
        values = (values if values.ndim == 4 else values[None])[:tiles, :, :height, :width]
        mean, std = (np.array(one, np.float32)[:, None, None] for one in (image.mean, image.std))
        found = np.frombuffer(image.pixels, np.uint8).reshape(image.shape).astype(np.float32) / 255
        np.testing.assert_allclose((found - mean) / std, values, atol=1e-6)


async def test_idefics(tmp_path: Path) -> None:
    model = idefics(tmp_path)
    sight = model.sight()
    try:
        for pieces in PROMPTS[:-1]:
            ids, images = await seen(sight, model.tokenizer, markdown(pieces))
            given = [piece if isinstance(piece, str) else picture(*piece) for piece in pieces]
            expected = model.processor(text=[given], return_tensors="pt", add_end_of_utterance_token=False)
            assert [model.tokenizer.token_to_id("<s>"), *ids] == expected["input_ids"][0].tolist(), pieces
            mask = expected["image_attention_mask"][0][1:]
            for place, image in enumerate(images):
                following = images[place + 1].start if place + 1 < len(images) else len(ids)
                until = min(image.until or len(ids), following)
                wanted = [image.start <= position < until for position in range(len(ids))]
                assert mask[:, place].bool().tolist() == wanted, pieces
            check_pixels(images, expected["pixel_values"].numpy())
    finally:
        await sight.close()


def test_truncation_moves_images_and_where_they_end(tmp_path: Path) -> None:
    def image(start: int, until: int) -> Image:
        return Image(start, 2, b"", (1, 3, 1, 1), (1, 1), (0, 0, 0), (1, 1, 1), b"", until)

    sight = llava_next(tmp_path).sight()
    assert sight.after_truncation([image(0, 0), image(5, 9)], 3) == (image(2, 6),)
    with pytest.raises(InvalidRequest, match="must not cut through an image"):
        sight.after_truncation([image(5, 9)], 6)


def test_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    config: dict[str, Any] = {"model_type": "llava_next", "vision_config": VISION}
    for files, words_of_error in (
        ({"size": {"shortest_edge": 30}}, "size and crop_size must be the tower's 28 pixels"),
        ({"image_mean": [1, 2]}, "makes no sense"),
        ({"image_grid_pinpoints": [[1, "a"]]}, "image_grid_pinpoints must be a list"),
        ({"resample": 99}, "is not one of Pillow's filters"),
        ({}, "no token that stands for images"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(files))
        with pytest.raises(ModelError, match=words_of_error):
            load_sight(tmp_path, vocabulary, Settings())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_sight(tmp_path, vocabulary, Settings()) is None
