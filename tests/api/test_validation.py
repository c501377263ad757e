"""Every rule of tgi.md 3.10 in TGI's words and order, and every refusal that comes before a handler."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from api_harness import ScriptedEngine, balance, events

from textmill.api.state import RouterState

RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 5}, "`best_of` must be > 0 and <= 4. Given: 5"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.5}, "`temperature` must be strictly positive"),
    ({"temperature": 1e-60}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": -2.01}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": 2.01}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": -0.5}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"watermark": True}, "`watermark` is not supported"),
    ({"adapter_id": "x"}, "`adapter_id` is not supported"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 40. Given: 0"),
    ({"truncate": 41}, "`truncate` must be strictly positive and less than 40. Given: 41"),
    (
        {"max_new_tokens": 199},
        "`inputs` tokens + `max_new_tokens` must be <= 200. Given: 2 `inputs` tokens and 199 `max_new_tokens`",
    ),
    (
        {"max_new_tokens": 4_000_000_000},
        "`inputs` tokens + `max_new_tokens` must be <= 200. Given: 2 `inputs` tokens and 1024 `max_new_tokens`",
    ),
    ({"grammar": {"type": "json", "value": {}}}, "grammar is not supported"),
]


def refused(answer: httpx.Response, message: str) -> None:
    assert answer.status_code == 422
    assert answer.json() == {"error": f"Input validation error: {message}", "error_type": "validation"}
    assert list(answer.json()) == ["error", "error_type"]


@pytest.mark.parametrize(("parameters", "message"), RULES)
async def test_rules(client: httpx.AsyncClient, state: RouterState, parameters: dict[str, Any], message: str) -> None:
    refused(await client.post("/generate", json={"inputs": "a", "parameters": parameters}), message)
    assert sum(balance(state).values()) == balance(state)["rejected"] >= 1
    assert state.metrics.failures.values == {("validation",): 1}


@pytest.mark.parametrize("place", range(2, 20))
async def test_an_earlier_rule_speaks_first(client: httpx.AsyncClient, place: int) -> None:
    """Each rule broken together with a later one: the first in TGI's order is named."""
    first, message = RULES[place]
    body = {"inputs": "", "parameters": {"truncate": 0, "grammar": {"type": "json"}} | first}
    refused(await client.post("/generate", json=body), message)


async def test_empty_and_long_inputs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    refused(await client.post("/generate", json={"inputs": ""}), "`inputs` cannot be empty")
    refused(
        await client.post("/generate", json={"inputs": "a" * 40, "parameters": {"max_new_tokens": 1}}),
        "`inputs` must have less than 40 tokens. Given: 41",
    )
    refused(
        await client.post("/generate", json={"inputs": "a" * 5000}),
        "`inputs` tokens + `max_new_tokens` must be <= 200. Given: 5001 `inputs` tokens and 0 `max_new_tokens`",
    )
    assert not engine.requests


async def test_best_of_may_be_switched_off(client: httpx.AsyncClient, state: RouterState) -> None:
    object.__setattr__(state.settings, "max_best_of", 1)
    body = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}
    refused(await client.post("/generate", json=body), "`best_of` != 1 is not allowed for this endpoint")
    assert (await client.post("/generate", json={"inputs": "a", "parameters": {"best_of": 0}})).status_code == 200


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ],
)
async def test_rules_in_streams(client: httpx.AsyncClient, path: str, parameters: dict[str, Any], message: str) -> None:
    answer = await client.post(path, json={"inputs": "a", "parameters": parameters, "stream": True})
    assert answer.status_code == 200
    assert events(answer.text) == [{"error": f"Input validation error: {message}", "error_type": "validation"}]


@pytest.mark.parametrize("parameters", [{"top_k": 2**31 - 1}, {"stop": []}, {"best_of": None}, {"unknown": 1}, {}])
async def test_legal_values(client: httpx.AsyncClient, parameters: dict[str, Any]) -> None:
    answer = await client.post("/generate", json={"inputs": "a", "parameters": parameters, "other": None})
    assert answer.status_code == 200


SHAPES = [
    (b"{}", "missing field `inputs`"),
    (b'{"inputs": ["a"]}', "inputs: invalid type: sequence, expected string"),
    (b'{"inputs": null}', "inputs: invalid type: null, expected string"),
    (b"[]", "invalid type: sequence, expected map"),
    (b'{"inputs": "a", "parameters": null}', "parameters: invalid type: null, expected map"),
    (b'{"inputs": "a", "parameters": {"top_k": 1.5}}', "parameters.top_k: invalid type: floating point, expected"),
    (b'{"inputs": "a", "parameters": {"stop": ["a", 1]}}', "parameters.stop[1]: invalid type: integer"),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": -1}}', "parameters.max_new_tokens: "),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": 4294967296}}', "parameters.max_new_tokens: "),
    (b'{"inputs": "a", "parameters": {"seed": -1}}', "parameters: invalid value: integer `-1`, expected u64"),
    (b'{"inputs": "a", "parameters": {"seed": 18446744073709551616}}', "expected u64"),
    (b'{"inputs": "a", "parameters": {"temperature": "1"}}', "parameters.temperature: invalid type: string"),
    (b'{"inputs": "a", "parameters": {"temperature": 1e400}}', "parameters.temperature: "),
    *(
        (json.dumps({"inputs": "a", "parameters": {name: None}}).encode(), f"parameters.{name}: invalid type: null")
        for name in ("do_sample", "stop", "watermark", "details", "decoder_input_details")
    ),
]


@pytest.mark.parametrize(("body", "message"), SHAPES)
async def test_wrong_shapes_are_plain_text(client: httpx.AsyncClient, body: bytes, message: str) -> None:
    answer = await client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("Failed to deserialize the JSON body into the target type: ")
    assert message in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"inputs": "a"',
        b'{"inputs": "a"} x',
        b'{"inputs": 5',
        b"[" * 15000,
        b'{"inputs":"a","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"inputs": "a", "parameters": {"temperature": NaN}}',
        b'\xef\xbb\xbf{"inputs": "a"}',
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "\\ud800"}',
        b"{'inputs': 'a'}",
    ],
)
async def test_broken_json_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.text.startswith("Failed to parse the request body as JSON: ")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_content_type(client: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = await client.post("/generate", content=b'{"inputs": "a"}', headers=headers)
    assert answer.status_code == 415
    assert answer.text == "Expected request with `Content-Type: application/json`"


async def test_content_types_that_are_json(client: httpx.AsyncClient) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        answer = await client.post("/generate", content=b'{"inputs": "a"}', headers={"content-type": kind})
        assert answer.status_code == 200


async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert (await client.post("/generate", content=b"x", headers=headers)).status_code == 415


async def test_too_large(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", json={"inputs": "a" * 30_000})
    assert answer.status_code == 413
    assert answer.text == "Failed to buffer the request body: length limit exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/generate", 405),
        ("PUT", "/", 405),
        ("POST", "/health", 405),
        ("GET", "/nowhere", 404),
        ("POST", "/generate/", 404),
        ("POST", "//generate", 404),
    ],
)
async def test_unknown_routes_and_methods_have_no_body(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, f"http://test{path}")
    assert (answer.status_code, answer.content) == (status, b"")


async def test_a_full_house_answers_429_before_looking(client: httpx.AsyncClient, state: RouterState) -> None:
    assert state.permits.try_acquire(8)
    answer = await client.post("/generate", json={"inputs": ""})
    assert answer.status_code == 429
    assert answer.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert int(answer.headers["retry-after"]) >= 1
    streamed = await client.post("/generate_stream", json={"inputs": "a"})
    assert streamed.status_code == 200
    assert events(streamed.text) == [{"error": "Model is overloaded", "error_type": "overloaded"}]
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 429
    [last, done] = events((await client.post("/v1/completions", json={"prompt": "a", "stream": True})).text)
    assert last == {"error": {"message": "Model is overloaded", "http_status_code": 429}}
    assert done == "[DONE]"
    state.permits.release(8)
    assert state.metrics.failures.values == {("overloaded",): 4}


async def test_best_of_takes_a_permit_per_sequence(client: httpx.AsyncClient, state: RouterState) -> None:
    assert state.permits.try_acquire(6)
    body = {"inputs": "a", "parameters": {"do_sample": True, "best_of": 3}}
    assert (await client.post("/generate", json=body)).status_code == 429
    body["parameters"] = {"do_sample": True, "best_of": 2}
    assert (await client.post("/generate", json=body)).status_code == 200
    state.permits.release(6)


async def test_no_engine_no_service(client: httpx.AsyncClient, engine: ScriptedEngine, state: RouterState) -> None:
    engine.connected = False
    for path in ("/generate", "/generate_stream"):
        answer = await client.post(path, json={"inputs": "a"})
        assert (answer.status_code, answer.json()["error_type"]) == (503, "healthcheck")
    engine.connected, state.draining = True, True
    for path in ("/generate", "/generate_stream"):
        answer = await client.post(path, json={"inputs": "a"})
        assert (answer.status_code, answer.json()["error_type"]) == (503, "draining")
