"""What a user does first, against a real server: curl's requests, streams, the openai and huggingface_hub clients."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Server

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


def events(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.decode() for line in response if line.startswith(b"data:")]
    return [json.loads(line[5:]) if "[DONE]" not in line else "[DONE]" for line in lines]


def test_the_request_of_the_contract(server: Server) -> None:
    status, headers, body = server.post("/generate", ISSUE_REQUEST)
    assert status == 200, body
    assert isinstance(body, dict)
    details = body["details"]
    assert body["generated_text"].startswith("Hello!")
    assert [token["text"] for token in details["prefill"]] == ["Hello", "!"]
    assert details["prefill"][0]["logprob"] is None
    assert details["prefill"][1]["logprob"] < 0
    assert details["generated_tokens"] == len(details["tokens"]) > 0
    assert details["finish_reason"] in ("stop_sequence", "length", "eos_token")
    assert headers["x-generated-tokens"] == str(details["generated_tokens"])


def test_a_stream_says_what_the_answer_says(server: Server) -> None:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 12, "details": True}}
    _, _, whole = server.post("/generate", body)
    assert isinstance(whole, dict)
    streamed = events(server, "/generate_stream", body)
    assert streamed[-1]["generated_text"] == whole["generated_text"]
    assert "".join(event["token"]["text"] for event in streamed) == whole["generated_text"]
    assert [event["token"]["id"] for event in streamed] == [t["id"] for t in whole["details"]["tokens"]]
    assert [event["token"]["logprob"] for event in streamed] == [t["logprob"] for t in whole["details"]["tokens"]]


def test_the_models_known_answer(server: Server) -> None:
    _, _, body = server.post("/generate", {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 2}})
    assert isinstance(body, dict)
    assert body["generated_text"] == " Paris."


def test_openai_client(server: Server) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        messages: Any = [{"role": "user", "content": "Say: Paris is the capital of France."}]
        answer = client.chat.completions.create(model="tgi", messages=messages, max_tokens=16, temperature=0)
        text = answer.choices[0].message.content
        assert text is not None
        assert "Paris" in text
        stream = client.chat.completions.create(
            model="tgi", messages=messages, max_tokens=16, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        completion = client.completions.create(
            model="tgi", prompt="The capital of France is", max_tokens=2, temperature=0
        )
        assert completion.choices[0].text == " Paris."
        assert [model.id for model in client.models.list()]


def test_huggingface_client(server: Server) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(server.url)
    short = {"max_new_tokens": 2, "return_full_text": False}
    assert client.text_generation("The capital of France is", **short) == " Paris."
    pieces = list(client.text_generation("The capital of France is", max_new_tokens=4, stream=True, details=True))
    assert "".join(piece.token.text for piece in pieces).startswith(" Paris.")
    chat = client.chat_completion([{"role": "user", "content": "Say hello."}], max_tokens=8)
    assert chat.choices[0].message.content


def test_best_of_returns_the_likeliest(server: Server) -> None:
    parameters = {"best_of": 3, "do_sample": True, "temperature": 1.2, "max_new_tokens": 8, "details": True}
    status, _, body = server.post("/generate", {"inputs": "My favourite colour is", "parameters": parameters})
    assert status == 200, body
    assert isinstance(body, dict)
    losers = body["details"]["best_of_sequences"]
    assert len(losers) == 2

    def mean(tokens: list[dict[str, float]]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    assert all(mean(body["details"]["tokens"]) >= mean(loser["tokens"]) for loser in losers)
    assert len({body["details"]["seed"], *(loser["seed"] for loser in losers)}) == 3


def test_a_seed_gives_the_same_text_again(server: Server) -> None:
    body = {"inputs": "Once upon a time", "parameters": {"do_sample": True, "seed": 2**63 + 5, "max_new_tokens": 20}}
    answers = {json.dumps(server.post("/generate", body)[2]) for _ in range(3)}
    assert len(answers) == 1


@pytest.mark.parametrize("path", ["/info", "/metrics", "/docs", "/openapi.json", "/v1/models", "/health"])
def test_pages_are_there(server: Server, path: str) -> None:
    assert server.status(path) == 200


def test_logs_hold_no_prompt_text(server: Server) -> None:
    server.post("/generate", {"inputs": "xylophone-canary-7731", "parameters": {"max_new_tokens": 3}})
    assert "canary" not in server.log.read_text()
