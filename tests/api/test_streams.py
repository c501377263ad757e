"""/generate_stream: the shape of events, and that a stream adds up to the plain answer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from api_harness import ScriptedEngine, events
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textmill.api.generation import Generation
from textmill.api.validation import Prompt
from textmill.core import Emission, Finish, Request, Sampling, TokenChoice
from textmill.text.tokenizer import Tokenizer


async def stream(client: httpx.AsyncClient, **parameters: Any) -> list[Any]:
    answer = await client.post("/generate_stream", json={"inputs": "hello", "parameters": parameters})
    assert answer.status_code == 200
    return events(answer.text)


async def test_headers(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate_stream", json={"inputs": "hello"})
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-compute-characters"] == "5"
    assert answer.headers["x-compute-type"] == "cpu+optimized"
    assert "content-length" not in answer.headers


async def test_events(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    found = await stream(client, details=True, do_sample=True, seed=7, top_n_tokens=1, return_full_text=True)
    assert [one["index"] for one in found] == [1, 2, 3]
    assert list(found[0]) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert list(found[0]["token"]) == ["id", "text", "logprob", "special"]
    assert found[0]["generated_text"] is None
    assert found[0]["details"] is None
    assert found[-1]["token"]["special"]
    assert found[-1]["generated_text"] == "hellohello world"
    details = found[-1]["details"]
    assert details == {"finish_reason": "eos_token", "generated_tokens": 3, "seed": 7, "input_length": 2}
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "input_length"]


async def test_events_without_details_or_top_tokens(client: httpx.AsyncClient) -> None:
    found = await stream(client)
    assert list(found[-1]) == ["index", "token", "generated_text", "details"]
    assert found[-1]["generated_text"] == "hello world"
    assert found[-1]["details"] is None


@pytest.mark.parametrize("text", ["hello world", "a😀é", "x\ny", "end. \n"])
@pytest.mark.parametrize("stop", [[], ["ell"], ["\n"], ["😀"], [". \n"]])
async def test_a_stream_adds_up_to_the_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, text: str, stop: list[str]
) -> None:
    engine.says(text)
    body = {"inputs": "a", "parameters": {"stop": stop, "details": True}}
    whole = (await client.post("/generate", json=body)).json()
    found = events((await client.post("/generate_stream", json=body)).text)
    assert found[-1]["generated_text"] == whole["generated_text"]
    assert [one["token"] for one in found] == whole["details"]["tokens"]
    plain = "".join(one["token"]["text"] for one in found if not one["token"]["special"])
    assert plain == whole["generated_text"]


async def test_tokens_of_one_step_come_as_events_of_their_own(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    ids = engine.tokenizer.encode("hello world", False).ids

    def script(request: Request) -> list[Emission]:
        return [Emission(request.id, tuple(TokenChoice(one, -1.0) for one in ids), Finish.LENGTH)]

    engine.script = script
    found = await stream(client, details=True)
    assert [one["token"]["text"] for one in found] == ["hello", " world"]
    assert found[0]["generated_text"] is None
    assert found[1]["details"]["finish_reason"] == "length"


async def test_an_end_without_a_token(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    [token] = engine.tokenizer.encode("hello", False).ids

    def script(request: Request) -> list[Emission]:
        return [Emission(request.id, (TokenChoice(token, -1.0),)), Emission(request.id, finish=Finish.LENGTH)]

    engine.script = script
    found = await stream(client, details=True)
    assert found[-1]["generated_text"] == "hello"
    assert found[-1]["details"]["generated_tokens"] == 1
    answer = await client.post("/generate", json={"inputs": "a", "parameters": {"details": True}})
    assert len(answer.json()["details"]["tokens"]) == answer.json()["details"]["generated_tokens"] == 1


async def test_failures_inside_a_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    [token] = engine.tokenizer.encode("hello", False).ids

    def fails(request: Request) -> list[Emission]:
        bad = Emission(request.id, finish=Finish.FAILED, error="the engine stopped")
        return [Emission(request.id, (TokenChoice(token, -1.0),)), bad]

    engine.script = fails
    found = await stream(client)
    assert found[0]["token"]["text"] == "hello"
    assert found[1:] == [{"error": "Request failed during generation: the engine stopped", "error_type": "generation"}]
    engine.script = lambda request: [Emission(request.id, (TokenChoice(token, -1.0),))]
    assert (await stream(client))[-1] == {
        "error": "Incomplete generation stream",
        "error_type": "incomplete_generation_stream",
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers(1, 4), st.integers(1))
def test_pieces_add_up_whatever_the_text(
    tokenizer: Tokenizer, text: str, stops: list[str], burst: int, seed: int
) -> None:
    """Any text, cut anywhere, in bursts of any size: pieces add up to the text, and end with the first stop string."""
    ids = tokenizer.encode(text or "a", False).ids
    prompt = Prompt("a", (1,), Sampling(), 64, 64, tuple(stops))
    generation = Generation(tokenizer, prompt, None)
    steps = []
    for place in range(0, len(ids), burst):
        group = ids[place : place + burst]
        finish = Finish.LENGTH if place + burst >= len(ids) else Finish.NONE
        steps += generation.push(Emission(1, tuple(TokenChoice(one, -1.0) for one in group), finish))
        if generation.finish:
            break
    assert "".join(step.text for step in steps) == generation.text
    assert "".join(step.token.text for step in steps if not step.token.special) == generation.text
    assert (text or "a").startswith(generation.text)
    ends = [(text or "a").find(stop) + len(stop) for stop in stops if stop in (text or "a")]
    assert len(generation.text) == (min(ends) if ends else len(text or "a"))
