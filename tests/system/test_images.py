"""Real pictures to a tiny model that sees, over HTTP: transformers' tokens, from transformers' own processor."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from transformers import AutoModelForImageTextToText, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.images.pictures import encoded, picture, png_of
from tests.models.cases import vision

if TYPE_CHECKING:
    from conftest import Server

TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def tokenizer_for(folder: Path) -> PreTrainedTokenizerFast:
    """Words w0, w1, … and the image token."""
    words = {f"w{number}": number for number in range(vision.IMAGE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<image>"])
    assert backend.token_to_id("<image>") == vision.IMAGE
    backend.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def processor_for(folder: Path) -> Any:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=vision.CHOICES
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer_for(folder),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return processor


def markdown(data: bytes) -> str:
    return f"![]({url(data)})"


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_pictures_over_http(launch: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    vision.llava_next(vision.text("llama"))(folder)
    processor = processor_for(folder)
    server = launch("--model-id", str(folder), "--max-total-tokens", "400", "--router-workers", "2")
    first, second = picture(40, 70, 1), picture(31, 30, 2)
    inputs = processor(text="w5 <image> w9 <image> w7", images=[first, second], return_tensors="pt")
    expected = greedy(folder, inputs)
    prompt = f"w5 {markdown(encoded(first))} w9 {markdown(encoded(second))} w7"
    parameters = {"max_new_tokens": 16, "details": True, "ignore_eos_token": True}
    for prefill in (True, False):  # the second time from the prefix cache
        body = {"inputs": prompt, "parameters": parameters | {"decoder_input_details": prefill}}
        status, _, answer = server.post("/generate", body)
        assert status == 200, (answer, server.log.read_text())
        found: Any = answer
        assert [token["id"] for token in found["details"]["tokens"]] == expected
        prompt_ids = [token["id"] for token in found["details"]["prefill"]]
        assert prompt_ids == (inputs["input_ids"][0].tolist() if prefill else [])
    content = [
        {"type": "text", "text": "w5"},
        {"type": "image_url", "image_url": {"url": url(encoded(first))}},
        {"type": "text", "text": "w9"},
        {"type": "image_url", "image_url": {"url": url(encoded(second, "WEBP", lossless=True))}},
        {"type": "text", "text": "w7"},
    ]
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
    }
    status, _, answer = server.post("/v1/chat/completions", asked)
    assert status == 200, (answer, server.log.read_text())
    chat: Any = answer
    assert chat["choices"][0]["message"]["content"].split() == [f"w{number}" for number in expected]
    refused_and_still_there(server)


@torch.inference_mode()
def greedy(folder: Path, inputs: Any) -> list[int]:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokens: list[int] = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()
    return tokens[inputs["input_ids"].shape[1] :]


def refused_and_still_there(server: Server) -> None:
    whole = encoded(picture(40, 70))
    for inputs in (
        markdown(png_of(60_000, 60_000)),
        markdown(whole[: len(whole) // 2]),
        markdown(b"no picture"),
        "![](http://169.254.169.254/latest/meta-data)",
        "![](https://example.org/x.png)",
        "w5 <image>",
    ):
        status, _, answer = server.post("/generate", {"inputs": inputs})
        assert status == 422, (answer, server.log.read_text())
    assert server.post("/generate", {"inputs": "w5 w6", "parameters": {"max_new_tokens": 2}})[0] == 200
