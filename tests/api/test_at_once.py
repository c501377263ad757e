"""Tokens that go out the moment they arrive, without a switch of tasks: the same bytes, the same endings."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from api_harness import Live, ScriptedEngine, events, until

from textmill.api.openai_format import ChatFormat, CompletionFormat, Heading
from textmill.api.sse import Mould, frame
from textmill.core import Emission, Finish, Request, TokenChoice

STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 2}}),
    ("/generate_stream", {"inputs": "a", "parameters": {"stop": ["lo w"]}}),
    ("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 50}),
    ("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 50, "stop": ["w"]}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True, "max_tokens": 50}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 50}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "stream": True, "logprobs": True, "top_logprobs": 1},
    ),
]


def without_time(text: str) -> str:
    return re.sub(r'"created":\d+', '"created":0', text)


async def over_socket(live: Live, path: str, body: dict[str, Any]) -> str:
    async with httpx.AsyncClient(base_url=live.url, timeout=10) as client:
        return (await client.post(path, json=body)).text


@pytest.mark.parametrize(("path", "body"), STREAMS)
@pytest.mark.parametrize("text", ["hello world, hello", "a😀é\n"])
async def test_the_bytes_are_those_of_asgi(
    live: Live, client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any], text: str
) -> None:
    """Over a socket tokens take the short way, over the test transport there is none."""
    engine.says(text)
    slow = (await client.post(path, json=body)).text
    assert engine.taken == 0
    fast = await over_socket(live, path, body)
    alone = not isinstance(body.get("prompt"), list)
    assert (engine.taken > 0) == alone
    if alone:
        assert without_time(fast) == without_time(slow)
    else:  # the order between choices is the engine's
        assert sorted(without_time(fast).split("\n")) == sorted(without_time(slow).split("\n"))


async def test_an_error_of_ours_ends_only_its_own_stream(
    live: Live, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("boom")

    monkeypatch.setattr(CompletionFormat, "frames", broken)
    found = events(await over_socket(live, "/v1/completions", {"prompt": "a", "stream": True}))
    assert found[-2]["error"]["http_status_code"] == 500
    assert found[-1] == "[DONE]"
    assert "hello world" in await over_socket(live, "/generate_stream", {"inputs": "a"})


async def test_a_failure_after_tokens_that_went_at_once(live: Live, engine: ScriptedEngine) -> None:
    [token] = engine.tokenizer.encode("hello", False).ids

    def fails(request: Request) -> list[Emission]:
        plain = Emission(request.id, (TokenChoice(token, -1.0),))
        return [plain, plain, Emission(request.id, finish=Finish.FAILED, error="gone")]

    engine.script = fails
    found = events(await over_socket(live, "/generate_stream", {"inputs": "a"}))
    assert [one.get("index") for one in found] == [1, 2, None]
    assert found[-1]["error_type"] == "generation"
    assert engine.taken == 2
    await until(lambda: live.state.metrics.ledger.open == 0)
    assert live.state.metrics.ledger.count("failed") == 1


@pytest.mark.parametrize("text", ["", "a", '"text":""', "é😀\\\u2028\x00"])
def test_a_mould_gives_what_encoding_gives(text: str) -> None:
    heading = Heading('a "text":"" model', "1")
    for one in (ChatFormat(heading, False), CompletionFormat(heading)):
        mould = Mould(lambda piece, one=one: one._chunk(3, piece))  # type: ignore[misc]
        assert mould.frame(text) == frame(one._chunk(3, text))
