"""/generate and POST /: shapes, key presence and order, seeds, best_of, stop strings, headers."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from api_harness import ScriptedEngine

from textmill.core import Emission, Finish, Request, TokenChoice
from textmill.text.tokenizer import Tokenizer

ISSUE_REQUEST = {
    "inputs": "Hello!",
    "parameters": {
        "best_of": 1,
        "details": True,
        "return_full_text": True,
        "decoder_input_details": True,
        "truncate": 10,
        "max_new_tokens": 128,
        "stop": ["\n", "."],
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 10,
        "top_p": 0.95,
    },
}


async def generate(client: httpx.AsyncClient, inputs: str = "hello", **parameters: Any) -> Any:
    answer = await client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_plain_answer_has_one_key(client: httpx.AsyncClient) -> None:
    assert await generate(client) == {"generated_text": "hello world"}


async def test_the_request_of_the_contract(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.says(" you.\nAnd more", Finish.LENGTH)
    answer = await client.post("/generate", json=ISSUE_REQUEST)
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["generated_text", "details"]
    assert body["generated_text"] == "Hello! you."
    details = body["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert details["finish_reason"] == "stop_sequence"
    assert details["generated_tokens"] == len(details["tokens"]) == len(" you.")
    assert 0 <= details["seed"] < 2**64
    assert [list(one) for one in details["prefill"]] == [["id", "text", "logprob"]] * 6
    assert details["prefill"][0] == {"id": engine.requests[0].tokens[0], "text": "<s>", "logprob": None}
    assert details["prefill"][2] == {"id": engine.requests[0].tokens[2], "text": "e", "logprob": -2.0}
    assert list(details["tokens"][0]) == ["id", "text", "logprob", "special"]
    assert details["tokens"][-1]["text"] == "."
    [request] = engine.requests
    assert request.sampling.do_sample
    assert request.sampling.top_k == 10
    assert request.sampling.temperature == pytest.approx(0.8)
    assert request.sampling.seed == details["seed"]
    assert request.prompt_logprobs
    assert request.max_new_tokens == 128
    assert engine.cancelled == [request.id]


async def test_details_and_end_of_sequence(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await generate(client, details=True)
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["seed"] is None
    assert details["prefill"] == []
    assert details["tokens"][-1] == {"id": tokenizer.eos_ids[0], "text": "</s>", "logprob": -0.5, "special": True}
    assert [one["text"] for one in details["tokens"]] == ["hello", " world", "</s>"]
    assert "top_tokens" not in details
    assert "best_of_sequences" not in details


async def test_decoder_input_details_alone_gives_details(client: httpx.AsyncClient) -> None:
    assert (await generate(client, decoder_input_details=True))["details"]["prefill"][0]["logprob"] is None


async def test_top_tokens(client: httpx.AsyncClient) -> None:
    details = (await generate(client, details=True, top_n_tokens=2))["details"]
    assert list(details)[-1] == "top_tokens"
    assert details["top_tokens"][0] == [
        {"id": details["tokens"][0]["id"], "text": "hello", "logprob": -0.25, "special": False},
        {"id": details["tokens"][-1]["id"], "text": "</s>", "logprob": -1.5, "special": True},
    ]


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (math.nan, "null"),
        (-math.inf, "null"),
        (-0.10000000149011612, "-0.1"),
        (-1.000000013351432e-10, "-1e-10"),
        (-16777216.0, "-16777216.0"),
        (-0.30000001192092896, "-0.3"),
        (-2.7182817459106445, "-2.7182817"),
    ],
)
async def test_log_probabilities_in_shortest_form(
    client: httpx.AsyncClient, engine: ScriptedEngine, value: float, printed: str
) -> None:
    engine.says("hello", logprob=value)
    answer = await client.post("/generate", json={"inputs": "a", "parameters": {"details": True}})
    assert f'"text":"hello","logprob":{printed},' in answer.text


async def test_without_parameters_tokens_are_drawn(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/generate", json={"inputs": "hello"})
    await generate(client)
    assert [one.sampling.do_sample for one in engine.requests] == [True, False]


async def test_seeds(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    details = (await generate(client, details=True, do_sample=True, seed=2**64 - 1))["details"]
    assert details["seed"] == engine.requests[0].sampling.seed == 2**64 - 1
    assert (await generate(client, details=True, seed=5))["details"]["seed"] is None  # greedy
    assert (await generate(client, details=True, temperature=1.0, seed=5))["details"]["seed"] is None  # TGI's rule
    assert (await generate(client, details=True, top_k=3, seed=5))["details"]["seed"] == 5


async def test_best_of_puts_the_likeliest_on_top(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answers = iter([("hello", -0.9), (" world", -0.2), ("end", -0.2)])

    def script(request: Request) -> list[Emission]:
        text, logprob = next(answers)
        [token] = engine.tokenizer.encode(text, False).ids
        return [Emission(request.id, (TokenChoice(token, logprob),), Finish.LENGTH)]

    engine.script = script
    body = await generate(client, best_of=3, do_sample=True, details=True, max_new_tokens=1)
    assert body["generated_text"] == " world"
    details = body["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "best_of_sequences"]
    losers = details["best_of_sequences"]
    assert [one["generated_text"] for one in losers] == ["hello", "end"]
    assert list(losers[0]) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    seeds = {details["seed"], *(one["seed"] for one in losers)}
    assert seeds == {one.sampling.seed for one in engine.requests}
    assert len(seeds) == 3


async def test_best_of_fails_as_one(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    said = engine.script
    assert said is not None

    def script(request: Request) -> list[Emission]:
        if request.id == 2:
            return [Emission(request.id, finish=Finish.FAILED, error="NaN in the logits")]
        return said(request)

    engine.script, engine.pace = script, 0.01
    answer = await client.post("/generate", json={"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})
    assert answer.status_code == 424
    assert answer.json() == {
        "error": "Request failed during generation: NaN in the logits",
        "error_type": "generation",
    }
    assert engine.cancelled == [1]


@pytest.mark.parametrize(
    ("stop", "text", "generated", "reason"),
    [
        (["ell"], "hell", 1, "stop_sequence"),  # inside the first token
        (["lo wo"], "hello wo", 2, "stop_sequence"),  # across two tokens, ending inside the second
        (["world"], "hello world", 2, "stop_sequence"),  # at a token's end
        (["zzz", "o"], "hello", 1, "stop_sequence"),
        (["never"], "hello world", 3, "eos_token"),
        ([""], "hello world", 3, "eos_token"),
        (["</s>"], "hello world", 3, "eos_token"),
    ],
)
async def test_stop_strings(
    client: httpx.AsyncClient, engine: ScriptedEngine, stop: list[str], text: str, generated: int, reason: str
) -> None:
    body = await generate(client, stop=stop, details=True)
    assert body["generated_text"] == text
    assert body["details"]["finish_reason"] == reason
    assert body["details"]["generated_tokens"] == generated
    plain = [one["text"] for one in body["details"]["tokens"] if not one["special"]]
    assert "".join(plain) == text
    assert len(engine.cancelled) == (reason == "stop_sequence")


async def test_length_comes_before_a_stop_string(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.says("hello", Finish.LENGTH)
    body = await generate(client, stop=["hello"], details=True)
    assert body["details"]["finish_reason"] == "length"


async def test_characters_split_over_tokens(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.says("a😀é")
    body = await generate(client, details=True)
    assert body["generated_text"] == "a😀é"
    assert [one["text"] for one in body["details"]["tokens"]] == ["a", "", "", "", "😀", "", "é", "</s>"]


async def test_a_broken_character_comes_out_at_the_end(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.says_ids(engine.tokenizer.encode("a😀", False).ids[:3], Finish.LENGTH)
    body = await generate(client, details=True)
    assert body["generated_text"] == "a\ufffd"
    assert "".join(one["text"] for one in body["details"]["tokens"]) == "a\ufffd"


async def test_truncate_keeps_the_end(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await generate(client, "abcdef", truncate=2)
    assert engine.tokenizer.decode(engine.requests[0].tokens) == "ef"


async def test_end_tokens_may_be_ignored(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await generate(client)
    await generate(client, ignore_eos_token=True)
    assert [one.stop_tokens for one in engine.requests] == [engine.tokenizer.eos_ids, ()]


async def test_length_limits(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await generate(client, "abc", max_new_tokens=7)
    await generate(client, "abc")
    assert [one.max_new_tokens for one in engine.requests] == [7, 196]


async def test_compat_route(client: httpx.AsyncClient) -> None:
    answer = await client.post("/", json={"inputs": "hello"})
    assert answer.json() == [{"generated_text": "hellohello world"}]
    body = {"inputs": "hello", "parameters": {"return_full_text": False}}
    assert (await client.post("/", json=body)).json() == [{"generated_text": "hello world"}]
    streamed = await client.post("/", json={"inputs": "hello", "stream": True})
    assert streamed.headers["content-type"] == "text/event-stream"
    assert '"generated_text":"hellohello world"' in streamed.text
    assert "DONE" not in streamed.text


async def test_headers(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", json={"inputs": "héllo"})
    headers = answer.headers
    assert headers["content-type"] == "application/json"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-prompt-tokens"] == "6"
    assert headers["x-generated-tokens"] == "3"
    assert headers["x-compute-type"] == "cpu+optimized"
    assert float(headers["x-compute-time"]) > 0
    for name in ("total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    assert int(headers["x-time-per-token"]) >= 0


async def test_the_engines_failure_is_a_424(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Emission(request.id, finish=Finish.FAILED, error="the engine stopped")]
    answer = await client.post("/generate", json={"inputs": "a"})
    assert answer.status_code == 424
    assert answer.json()["error_type"] == "generation"


async def test_an_engine_that_just_stops_is_a_500(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Emission(request.id, (TokenChoice(1, -1.0),))]
    answer = await client.post("/generate", json={"inputs": "a"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "Incomplete generation", "error_type": "incomplete_generation"}


async def test_a_surprise_stays_inside(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def script(request: Request) -> list[Emission]:
        raise ZeroDivisionError("secret canary")

    engine.script = script
    answer = await client.post("/generate", json={"inputs": "a"})
    assert answer.status_code == 500
    assert "canary" not in answer.text
    assert json.loads(answer.text)["error_type"] == "internal"


async def test_tenants_have_their_own_salt(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for key in ("one", "two", "one", None):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        await client.post("/generate", json={"inputs": "a"}, headers=headers)
    first, second, third, none = (one.cache_salt for one in engine.requests)
    assert first == third != second
    assert none == b""


async def test_tokenize(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"inputs": "hello é"})
    rows = answer.json()
    assert rows[0] == {"id": 268, "text": "", "start": 0, "stop": 0}
    assert [list(row) for row in rows] == [["id", "text", "start", "stop"]] * len(rows)
    assert [(row["text"], row["start"], row["stop"]) for row in rows[1:3]] == [("hello", 0, 5), (" ", 5, 6)]
    assert (rows[-1]["start"], rows[-1]["stop"]) == (6, 8)
