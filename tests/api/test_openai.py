"""/v1/chat/completions, /v1/completions, /v1/models, /chat_tokenize: TGI's dialect of OpenAI's shapes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from api_harness import Live, ScriptedEngine, balance, events

from textmill.api.state import RouterState
from textmill.core import Finish

MESSAGES = [{"role": "user", "content": "hello"}]


async def chat(client: httpx.AsyncClient, **fields: Any) -> Any:
    answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def chunks(client: httpx.AsyncClient, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
    defaults = {"messages": MESSAGES} if "chat" in path else {"prompt": "hello"}
    answer = await client.post(path, json=defaults | {"stream": True} | fields)
    assert answer.status_code == 200, answer.text
    *found, done = events(answer.text)
    assert done == "[DONE]"
    return found


async def test_chat_answer(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = await chat(client)
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert (body["object"], body["id"], body["model"]) == ("chat.completion", "", "test/model")
    assert body["system_fingerprint"] == "0.1.0-native"
    message = {"role": "assistant", "content": "hello world"}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    length = len(engine.requests[0].tokens)
    assert body["usage"] == {"prompt_tokens": length, "completion_tokens": 3, "total_tokens": length + 3}
    assert engine.tokenizer.decode(engine.requests[0].tokens, False) == "<|user|>hello</s><|assistant|>"
    assert engine.requests[0].sampling.do_sample


async def test_chat_headers_count_the_templated_prompt(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.headers["x-compute-characters"] == str(len("<|user|>hello</s><|assistant|>"))
    assert answer.headers["x-generated-tokens"] == "3"


async def test_chat_chunks(client: httpx.AsyncClient) -> None:
    found = await chunks(client)
    keys = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert [list(one) for one in found] == [keys] * 3
    assert [one["object"] for one in found] == ["chat.completion.chunk"] * 3
    assert [one["choices"][0]["delta"] for one in found] == [
        {"role": "assistant", "content": text} for text in ("hello", " world", "")
    ]
    assert [one["choices"][0]["finish_reason"] for one in found] == [None, None, "stop"]
    assert [one["usage"] for one in found] == [None] * 3


async def test_usage_chunk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    found = await chunks(client, stream_options={"include_usage": True})
    assert found[-1]["choices"] == []
    length = len(engine.requests[0].tokens)
    assert found[-1]["usage"] == {"prompt_tokens": length, "completion_tokens": 3, "total_tokens": length + 3}
    assert len(await chunks(client, stream_options=None)) == 3


async def test_logprobs(client: httpx.AsyncClient) -> None:
    body = await chat(client, logprobs=True, top_logprobs=2)
    first = body["choices"][0]["logprobs"]["content"][0]
    top = [{"token": "hello", "logprob": -0.25}, {"token": "</s>", "logprob": -1.5}]
    assert first == {"token": "hello", "logprob": -0.5, "top_logprobs": top}
    found = await chunks(client, logprobs=True)
    assert found[0]["choices"][0]["logprobs"] == {"content": [{"token": "hello", "logprob": -0.5, "top_logprobs": []}]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 1.0}),
        ({"temperature": 0}, {"do_sample": False, "temperature": 1.0}),
        ({"temperature": 0.5, "top_p": 0.5}, {"do_sample": True, "temperature": 0.5, "top_p": 0.5}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"seed": 2**63}, {"seed": 2**63}),
        ({"presence_penalty": 0}, {"repetition_penalty": 1.0}),
        ({"presence_penalty": -0.5}, {"repetition_penalty": 1.5}),
        ({"frequency_penalty": 0.25}, {"frequency_penalty": 0.25}),
    ],
)
async def test_sampling(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    await chat(client, **fields)
    for name, value in expected.items():
        assert getattr(engine.requests[0].sampling, name) == value


async def test_lengths_and_names(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, max_tokens=5)
    await chat(client, max_completion_tokens=6)
    assert [one.max_new_tokens for one in engine.requests] == [5, 6]
    assert (await chat(client, model="tgi"))["model"] == "test/model"
    assert (await chat(client, model="gpt-4o"))["model"] == "gpt-4o"
    assert (await chat(client, user="u", parallel_tool_calls=True, store=False))["id"] == ""
    await chat(client, ignore_eos=True)
    assert engine.requests[-1].stop_tokens == ()


@pytest.mark.parametrize("stop", ["lo w", ["lo w"], ["zz", "lo w"]])
async def test_stop(client: httpx.AsyncClient, stop: Any) -> None:
    choice = (await chat(client, stop=stop))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hello w", "stop_sequence")
    found = await chunks(client, stop=stop)
    assert "".join(one["choices"][0]["delta"]["content"] for one in found) == "hello w"
    assert found[-1]["choices"][0]["finish_reason"] == "stop_sequence"


async def test_several_choices(client: httpx.AsyncClient, engine: ScriptedEngine, state: RouterState) -> None:
    body = await chat(client, n=3, seed=5)
    assert [one["index"] for one in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 9
    seeds = [one.sampling.seed for one in engine.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    found = await chunks(client, n=2)
    for index in (0, 1):
        mine = [one["choices"][0] for one in found if one["choices"][0]["index"] == index]
        assert "".join(one["delta"]["content"] for one in mine) == "hello world"
        assert mine[-1]["finish_reason"] == "stop"
    assert balance(state)["completed"] == 5


@pytest.mark.parametrize(
    ("fields", "error", "kind"),
    [
        ({"tools": [{"type": "function"}]}, "Tool error: `tools` are not supported", "tool_error"),
        (
            {"response_format": {"type": "json_object"}},
            "Input validation error: grammar is not supported",
            "validation",
        ),
        ({"logit_bias": {"5": 1}}, "Input validation error: `logit_bias` is not supported", "validation"),
        ({"n": 5}, "Input validation error: `n` must be > 0 and <= 4. Given: 5", "validation"),
        (
            {"presence_penalty": -2},
            "Input validation error: `repetition_penalty` must be strictly positive",
            "validation",
        ),
    ],
)
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], error: str, kind: str) -> None:
    answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)
    assert (answer.status_code, answer.json()) == (422, {"error": error, "error_type": kind})


async def test_template_and_tool_errors_precede_a_stream(
    client: httpx.AsyncClient, state: RouterState, engine: ScriptedEngine
) -> None:
    body = {"messages": MESSAGES, "stream": True, "tools": [{"type": "function"}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 422
    state.chat_template = None
    answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert answer.status_code == 422
    assert answer.json() == {"error": "Template error: template not found", "error_type": "template_error"}
    assert state.metrics.failures.values == {("validation",): 1, ("template",): 1}
    assert not engine.requests


async def test_errors_in_a_chat_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.says("hello", Finish.FAILED)
    answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert answer.status_code == 200
    message = "Request failed during generation: the engine failed"
    assert events(answer.text) == [{"error": {"message": message, "http_status_code": 424}}, "[DONE]"]
    [error, done] = await_events(await client.post("/v1/chat/completions", json=stream_of(top_p=2)))
    assert error["error"]["http_status_code"] == 422
    assert done == "[DONE]"


def stream_of(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "stream": True} | fields


def await_events(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200
    return events(answer.text)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        (
            {
                "role": "tool",
                "tool_calls": [{"id": "0", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            '[{"id":"0","type":"function","function":{"description":null,"name":"f","arguments":"{\\"x\\":1}"}}]',
        ),
        ({"role": "x", "content": "", "name": "me", "tool_call_id": "9"}, ""),
    ],
)
async def test_messages(client: httpx.AsyncClient, message: dict[str, Any], text: str) -> None:
    answer = await client.post("/chat_tokenize", json={"messages": [message]})
    body = answer.json()
    assert list(body) == ["tokenize_response", "templated_text"]
    assert body["templated_text"] == f"<|{message['role']}|>{text}</s><|assistant|>"
    assert body["tokenize_response"][0]["text"] == "<"


async def test_an_assistants_last_message_is_continued(client: httpx.AsyncClient) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    body = (await client.post("/chat_tokenize", json={"messages": messages})).json()
    assert body["templated_text"] == "<|user|>hello</s><|assistant|>Well,"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "video", "url": "x"}]}]},
        {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1},
        {"messages": MESSAGES, "stream": None},
        {"messages": MESSAGES, "stop": 5},
        {"messages": "hello"},
    ],
)
async def test_wrong_shapes(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 422
    assert answer.text.startswith("Failed to deserialize the JSON body into the target type: ")


async def test_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await client.post("/v1/completions", json={"prompt": ["a", "bc"], "temperature": 0, "max_tokens": 9})
    body = answer.json()
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["object"] == "text_completion"
    assert [list(one) for one in body["choices"]] == [["index", "text", "logprobs", "finish_reason"]] * 2
    assert body["choices"][1] == {"index": 1, "text": "hello world", "logprobs": None, "finish_reason": "stop"}
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert "x-compute-time" not in answer.headers
    assert answer.headers["x-compute-type"] == "cpu+optimized"
    assert answer.headers["x-compute-characters"] == "3"
    assert answer.headers["x-prompt-tokens"] == "5"
    assert answer.headers["x-generated-tokens"] == "6"
    assert not any(one.prompt_logprobs for one in engine.requests)


async def test_completion_chunks(client: httpx.AsyncClient) -> None:
    found = await chunks(client, "/v1/completions", model="whatever")
    keys = ["object", "id", "created", "choices", "model", "system_fingerprint"]
    assert [list(one) for one in found[:-1]] == [keys] * 2
    assert list(found[-1]) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert [one["choices"][0]["text"] for one in found] == ["hello", " world", ""]
    assert [one["choices"][0]["finish_reason"] for one in found] == ["", "", "eos_token"]
    assert found[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert {one["model"] for one in found} == {"test/model"}


async def test_several_prompts_in_one_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.pace = 0.001
    found = await chunks(client, "/v1/completions", prompt=["a", "b", "c"])
    for index in range(3):
        mine = [one["choices"][0] for one in found if one["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in mine) == "hello world"
        assert mine[-1]["finish_reason"] == "eos_token"
    assert [one["choices"][0]["index"] for one in found] != sorted(one["choices"][0]["index"] for one in found)


async def test_one_bad_prompt_fails_all(client: httpx.AsyncClient, state: RouterState) -> None:
    answer = await client.post("/v1/completions", json={"prompt": ["a", ""]})
    assert answer.status_code == 422
    assert answer.json()["error"] == "Input validation error: `inputs` cannot be empty"
    assert balance(state)["completed"] == 0


@pytest.mark.parametrize(
    ("fields", "error", "kind"),
    [
        (
            {"prompt": ["a"] * 5},
            "Number of prompts exceeds the maximum allowed batch size of 4",
            "batch size exceeded",
        ),
        (
            {"prompt": "a", "suffix": ""},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_routes_own_refusals(
    client: httpx.AsyncClient, fields: dict[str, Any], error: str, kind: str, stream: bool
) -> None:
    answer = await client.post("/v1/completions", json=fields | {"stream": stream})
    assert (answer.status_code, answer.json()) == (422, {"error": error, "error_type": kind})


async def test_empty_list_of_prompts(client: httpx.AsyncClient) -> None:
    for prompt in ([], [[1, 2]], None):
        answer = await client.post("/v1/completions", json={"prompt": prompt})
        assert answer.status_code == 422
        assert answer.text.startswith("Failed to deserialize")
    answer = await client.post("/v1/completions", json={"prompt": []})
    assert answer.text.endswith("Empty array detected. Do not use an empty array for the prompt.")


async def test_models(client: httpx.AsyncClient) -> None:
    data = [{"id": "test/model", "object": "model", "created": 0, "owned_by": "test/model"}]
    assert (await client.get("/v1/models")).json() == {"object": "list", "data": data}


async def test_the_openai_client(live: Live) -> None:
    from openai import APIError, AsyncOpenAI, UnprocessableEntityError

    messages: Any = MESSAGES
    async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0) as client:
        answer = await client.chat.completions.create(model="tgi", messages=messages, max_tokens=9, logprobs=True)
        assert answer.choices[0].message.content == "hello world"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        options: Any = {"include_usage": True}
        stream = await client.chat.completions.create(
            model="tgi", messages=messages, stream=True, stream_options=options
        )
        found = [chunk async for chunk in stream]
        assert "".join(one.choices[0].delta.content or "" for one in found if one.choices) == "hello world"
        assert found[-1].usage is not None
        completion = await client.completions.create(model="tgi", prompt=["a", "b"])
        assert [one.text for one in completion.choices] == ["hello world"] * 2
        pieces = await client.completions.create(model="", prompt="a", stream=True)
        assert "".join([one.choices[0].text async for one in pieces]) == "hello world"
        assert [one.id async for one in client.models.list()] == ["test/model"]
        with pytest.raises(UnprocessableEntityError) as caught:
            await client.chat.completions.create(model="tgi", messages=messages, logprobs=True, top_logprobs=9)
        assert "top_n_tokens" in caught.value.response.json()["error"]
        bad = await client.chat.completions.create(model="tgi", messages=messages, stream=True, max_tokens=0)
        with pytest.raises(APIError, match="max_new_tokens"):
            [one async for one in bad]
