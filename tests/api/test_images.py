"""Images on the web side: what reaches the engine, and what is refused with a reason before anything is fetched."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.api.api_harness import ScriptedEngine, balance
from tests.images.pictures import encoded, picture, png_of
from textmill.api.state import RouterState
from textmill.images.address import hosts
from textmill.images.decoder import Decoder
from textmill.images.fetch import Fetcher
from textmill.images.prompt import Sight
from textmill.images.recipe import BICUBIC, CLIP_MEAN, CLIP_STD, Recipe
from textmill.text.chat import ChatTemplate

SQUARE = Recipe("square", CLIP_MEAN, CLIP_STD, BICUBIC, side=8, tokens=2)
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}</s>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PICTURE = data_url(encoded(picture(20, 30)))


@pytest.fixture
async def seeing(state: RouterState, engine: ScriptedEngine) -> AsyncIterator[RouterState]:
    """A model for which every image is two of the tokens `</s>`."""
    engine.says("hello")
    token = state.tokenizer.backend.token_to_id("</s>")
    fetcher = Fetcher(hosts(("images.example.org",)), 1000)
    state.sight = Sight(SQUARE, "</s>", token, Decoder(SQUARE), fetcher)
    yield state
    await state.sight.close()


async def test_markdown_becomes_tokens_and_pixels(
    client: httpx.AsyncClient, seeing: RouterState, engine: ScriptedEngine
) -> None:
    body = {"inputs": f"a![]({PICTURE})b![]({PICTURE})", "parameters": {"best_of": 2, "do_sample": True}}
    answer = await client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert len(engine.requests) == 2
    token, words = seeing.tokenizer.eos_ids[0], [seeing.tokenizer.encode(one, False).ids for one in "ab"]
    for request in engine.requests:
        assert list(request.tokens[1:]) == [*words[0], token, token, *words[1], token, token]
        first, second = request.images
        assert (first.start, first.count, second.start, second.count) == (2, 2, 5, 2)
        assert first.shape == (1, 3, 8, 8)
        assert (first.size, first.mean, first.digest) == ((20, 30), CLIP_MEAN, second.digest)
    assert balance(seeing)["completed"] == 2


@pytest.mark.parametrize("template", [None, PARTS])
async def test_chat_parts(
    client: httpx.AsyncClient, seeing: RouterState, engine: ScriptedEngine, template: str | None
) -> None:
    if template:
        seeing.chat_template = ChatTemplate(template)
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
        {"type": "text", "text": "b"},
    ]
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
    answer = await client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == (200 if template else 422), answer.text  # the plain template itself writes </s>
    if template:
        [request] = engine.requests
        assert seeing.tokenizer.decode(request.tokens, False) == "[system]x[user]a</s></s>b"
        assert [one.count for one in request.images] == [2]


async def test_truncation_spares_or_refuses_images(
    client: httpx.AsyncClient, seeing: RouterState, engine: ScriptedEngine
) -> None:
    async def truncated(count: int) -> httpx.Response:
        body = {"inputs": f"aaaa![]({PICTURE})b![]({PICTURE})", "parameters": {"truncate": count}}
        return await client.post("/generate", json=body)

    assert (await truncated(5)).status_code == 200
    assert (await truncated(3)).status_code == 200
    assert [[one.start for one in request.images] for request in engine.requests] == [[0, 3], [1]]
    answer = await truncated(4)
    assert answer.json()["error"] == "Input validation error: `truncate` must not cut through an image"


LONG = data_url(encoded(picture(20, 30))[:-40])
REFUSED = [
    (data_url(b"<svg/>", "image/svg+xml"), "image 1 of `inputs` (`data:image/svg+xml;base64,PHN2Zy8+`) is no PNG"),
    (data_url(b"%PDF-1.7", "application/pdf"), "is no PNG, JPEG, GIF or WebP"),
    (data_url(png_of(65_535, 65_535)), "is 65535 x 65535 pixels: the limit is 33554432 pixels"),
    (LONG, "it is broken or cut off"),
    ("data:image/png;base64,@@@", "base64 encoding is invalid: image 1"),
    ("data:image/png;a=b;base64,AAAA", "is not of the form data:image/png;base64,…"),
    ("data:,hello", "is not of the form"),
    ("/etc/passwd", "invalid image content: image 1 of `inputs` (`/etc/passwd`) is neither a data URL nor"),
    ("file:///etc/passwd", "invalid image content"),
    ("http://127.0.0.1/x.png", "Could not fetch image: `http://127.0.0.1/x.png`: its host is an IP address"),
    ("http://169.254.169.254/latest/meta-data", "its host is an IP address"),
    ("http://2130706433/", "its host is no plain name"),
    ("http://localhost./x", "its host is no plain name"),
    ("http://a:b@images.example.org/", "it names a user"),
    ("http://images.example.org:22/", "does not fetch images from images.example.org:22"),
    ("https://evil.org/x.png", "this server does not fetch images from host evil.org"),
    ("https://evil.org/" + "x" * 500, "`https://evil.org/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…`"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
async def test_refused(
    client: httpx.AsyncClient, seeing: RouterState, engine: ScriptedEngine, address: str, words: str
) -> None:
    for route, body in (
        ("/generate", {"inputs": f"a![]({address})"}),
        ("/v1/completions", {"prompt": f"a![]({address})"}),
    ):
        answer = await client.post(route, json=body)
        assert answer.status_code == 422, answer.text
        error = answer.json()
        assert error["error_type"] == "validation"
        assert words in error["error"]
        assert len(error["error"]) < 300
    assert not engine.requests
    assert balance(seeing)["rejected"] == 2


async def test_too_many_images(client: httpx.AsyncClient, seeing: RouterState) -> None:
    answer = await client.post("/generate", json={"inputs": "![](data:,)" * 33})
    assert answer.json()["error"] == "Input validation error: `inputs` has 33 images: the limit is 32"


async def test_images_that_take_too_long_together(
    client: httpx.AsyncClient, seeing: RouterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(url: str) -> bytes:
        await asyncio.sleep(0.1)
        return encoded(picture(20, 30))

    assert seeing.sight is not None
    monkeypatch.setattr(seeing.sight._fetcher, "fetch", slow)
    monkeypatch.setattr(seeing.sight, "_seconds", 0.25)
    answer = await client.post("/generate", json={"inputs": "![](https://images.example.org/a)" * 32})
    assert answer.json()["error"] == "Input validation error: the images of `inputs` took longer than 0.25 s"
    monkeypatch.setattr(seeing.sight, "_seconds", 60.0)
    answer = await client.post("/generate", json={"inputs": "![](https://images.example.org/a)"})
    assert answer.status_code == 200


async def test_image_tokens_in_the_text_are_refused(client: httpx.AsyncClient, seeing: RouterState) -> None:
    for text in ("a</s>", f"a</s>![]({PICTURE})"):
        answer = await client.post("/generate", json={"inputs": text})
        assert answer.status_code == 422
        assert "`inputs` must not have </s> in its text" in answer.json()["error"]


class TestModelsThatSeeNothing:
    """Markdown with addresses is text to them, as in TGI; what can only be meant as an image is refused."""

    async def test_addresses_are_text(self, client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        engine.says("hello")
        answer = await client.post("/generate", json={"inputs": "a![](http://x/y)"})
        assert answer.status_code == 200
        assert not engine.requests[0].images

    @pytest.mark.parametrize("route", ["/v1/chat/completions", "/chat_tokenize"])
    async def test_image_parts(self, client: httpx.AsyncClient, route: str) -> None:
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": "http://x/y"}}
        answer = await client.post(route, json={"messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 422
        assert "image modality is not supported: llama models take text only" in json.dumps(answer.json())

    async def test_data_urls(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={"inputs": f"a![]({PICTURE})"})
        assert answer.status_code == 422
        assert "image modality is not supported" in answer.json()["error"]
