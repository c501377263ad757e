"""Models with an encoder: inputs go to it, the decoder begins with its start token, and lengths are the inputs'."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from api_harness import INFO, ScriptedEngine

from textmill.api.router import Place, build_state
from textmill.api.state import RouterState
from textmill.config import Settings
from textmill.text.tokenizer import Tokenizer

START = 1


@pytest.fixture
def state(engine: ScriptedEngine, tokenizer: Tokenizer, settings: Settings) -> RouterState:
    info = replace(INFO, decoder_start_token_id=START)
    return build_state(settings, Place(-1, ""), engine, tokenizer, info, "")


async def test_inputs_go_to_the_encoder(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    parameters = {"details": True, "decoder_input_details": True}
    answer = await client.post("/generate", json={"inputs": "hello world", "parameters": parameters})
    [request] = engine.requests
    ids = tuple(tokenizer.encode("hello world", True).ids)
    assert (request.tokens, request.encoder_tokens) == ((START,), ids)
    assert request.max_new_tokens == INFO.max_total_tokens - len(ids)
    assert answer.json()["generated_text"] == "hello world"
    assert answer.json()["details"]["prefill"] == [{"id": START, "text": tokenizer.token_text(START), "logprob": None}]
    assert answer.headers["x-prompt-tokens"] == str(len(ids))


async def test_truncation_and_limits_are_the_inputs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/generate", json={"inputs": "hello world hello world", "parameters": {"truncate": 2}})
    assert len(engine.requests[0].encoder_tokens) == 2
    answer = await client.post("/generate", json={"inputs": "h " * 50})
    assert answer.status_code == 422
    assert "must have less than 40 tokens" in answer.json()["error"]


async def test_streams_count_the_inputs(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {"inputs": "hello world", "parameters": {"details": True}}
    answer = await client.post("/generate_stream", json=body)
    assert f'"input_length":{len(tokenizer.encode("hello world", True).ids)}' in answer.text
