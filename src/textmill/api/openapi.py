"""OpenAPI 3.1, made from the same types that decode the requests, with this server's limits written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from textmill.api.openai_schema import ChatChunk, ChatCompletion, ChatRequest, Completion, CompletionRequest
from textmill.api.schema import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    Info,
    SimpleToken,
    StreamResponse,
)
from textmill.api.state import RouterState

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"
REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says about one route; `answers` maps a content type to the type of its body."""

    method: str
    path: str
    summary: str
    request: Any = None
    answers: tuple[tuple[str, Any], ...] = ()
    guarded: bool = False


OPERATIONS = (
    Operation(
        "post", "/generate", "Generate, and answer when done.", GenerateRequest, ((JSON, GenerateResponse),), True
    ),
    Operation(
        "post",
        "/generate_stream",
        "Generate, one event per token.",
        GenerateRequest,
        ((EVENTS, StreamResponse),),
        True,
    ),
    Operation(
        "post",
        "/",
        "Generate, as the inference API does: a list with one answer, or events if `stream`.",
        CompatGenerateRequest,
        ((JSON, list[GenerateResponse]), (EVENTS, StreamResponse)),
        True,
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "Chat, in OpenAI's shapes.",
        ChatRequest,
        ((JSON, ChatCompletion), (EVENTS, ChatChunk)),
        True,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Complete one or several prompts, in OpenAI's shapes.",
        CompletionRequest,
        ((JSON, Completion), (EVENTS, Completion)),
        True,
    ),
    Operation("post", "/tokenize", "A text's tokens.", GenerateRequest, ((JSON, list[SimpleToken]),), True),
    Operation(
        "post",
        "/chat_tokenize",
        "A conversation's text and tokens.",
        ChatRequest,
        ((JSON, ChatTokenizeResponse),),
        True,
    ),
    Operation("get", "/v1/models", "The served model.", None, ((JSON, dict[str, Any]),)),
    Operation("get", "/info", "What is served, and its limits.", None, ((JSON, Info),)),
    Operation("get", "/health", "200 while the model makes progress, else 503."),
    Operation("get", "/health/live", "200 while the web process runs."),
    Operation("get", "/health/ready", "200 while new requests are welcome."),
    Operation("get", "/ping", "The same as /health."),
    Operation("get", "/", "The same as /health."),
    Operation("get", "/metrics", "Prometheus metrics.", None, ((TEXT, str),)),
    Operation("get", "/docs", "This page.", None, (("text/html", str),)),
    Operation("get", "/openapi.json", "This document.", None, ((JSON, dict[str, Any]),)),
    Operation("get", "/api-doc/openapi.json", "This document.", None, ((JSON, dict[str, Any]),)),
)
ERRORS = {
    "422": "A field breaks a rule (JSON), or the body has the wrong shape (plain text).",
    "424": "The model failed on this request.",
    "429": "Too many requests at once; try again.",
    "500": "The answer was cut short.",
    "503": "The model is not up, or the server is shutting down.",
}
NOTES: dict[str, str] = {
    "best_of": "Run so many, return the likeliest. Needs sampling, no seed, no stream.",
    "temperature": "Above 0; lower is more predictable.",
    "repetition_penalty": "Above 0; 1 is off.",
    "frequency_penalty": "From -2 to 2.",
    "top_k": "Sample among so many of the likeliest tokens.",
    "top_p": "Sample among the likeliest tokens of this total probability; above 0, below 1.",
    "typical_p": "Typical sampling; above 0, below 1.",
    "do_sample": "Draw at random. True if `parameters` is absent as a whole.",
    "max_new_tokens": "As many tokens at most; null: up to the context limit.",
    "return_full_text": "Put `inputs` before the generated text.",
    "stop": "Texts after which to stop; the one that matched is kept.",
    "truncate": "Keep only so many tokens at the end of the prompt.",
    "details": "Return tokens, log-probabilities and the reason to stop.",
    "decoder_input_details": "Return the prompt's tokens with their log-probabilities; not in streams.",
    "seed": "Equal seeds give equal tokens; null: a random one, which `details` tells.",
    "top_n_tokens": "Return so many of the likeliest tokens at each step.",
    "watermark": "Not supported: refused if true.",
    "grammar": "Not supported: refused if given.",
    "adapter_id": "Not supported: refused if given.",
    "tools": "Not supported: refused if given, unless `tool_choice` is `none`.",
    "response_format": 'Only `{"type": "text"}` is supported.',
    "logit_bias": "Not supported: refused if given.",
    "ignore_eos_token": "Go on after the end-of-text token.",
    "ignore_eos": "Go on after the end-of-text token.",
    "n": "Choices per prompt.",
    "model": "Any name is accepted; one model is served.",
}


def document(state: RouterState) -> dict[str, Any]:
    """The whole document for one server."""
    types = [body for one in OPERATIONS for body in (one.request, *(body for _, body in one.answers)) if body]
    schemas, components = msgspec.json.schema_components([*types, ErrorResponse], ref_template=REF)
    of_type = {repr(body): schema for body, schema in zip(types, schemas, strict=False)}
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _operation(one, of_type, state.settings.api_key is not None)
    _describe(components, _limits(state))
    return {
        "openapi": "3.1.0",
        "info": {"title": "textmill", "version": state.info.version, "description": f"Serves {state.model_name}."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(one: Operation, of_type: dict[str, Any], has_key: bool) -> dict[str, Any]:
    content = {kind: {"schema": of_type[repr(body)]} for kind, body in one.answers}
    found: dict[str, Any] = {
        "summary": one.summary,
        "responses": {"200": {"description": "OK", **({"content": content} if content else {})}},
    }
    if one.request is not None:
        body = {JSON: {"schema": of_type[repr(one.request)]}}
        found["requestBody"] = {"required": True, "content": body}
        error = {JSON: {"schema": {"$ref": REF.format(name="ErrorResponse")}}}
        found["responses"] |= {status: {"description": text, "content": error} for status, text in ERRORS.items()}
    if one.guarded and has_key:
        found["security"] = [{"key": []}]
        found["responses"]["401"] = {"description": "The key is missing or wrong."}
    return found


def _limits(state: RouterState) -> dict[str, str]:
    """The notes that only this server can complete."""
    settings, info = state.settings, state.info
    return {
        "best_of": f" At most {settings.max_best_of}.",
        "stop": f" At most {settings.max_stop_sequences}.",
        "truncate": f" At most {info.max_input_tokens}.",
        "top_n_tokens": f" At most {settings.max_top_n_tokens}.",
        "top_logprobs": f" At most {settings.max_top_n_tokens}.",
        "prompt": f" At most {settings.max_client_batch_size} prompts.",
        "n": f" At most {settings.max_client_batch_size}.",
        "inputs": f"The prompt: at most {info.max_input_tokens} tokens; with the answer {info.max_total_tokens}.",
        "messages": f"The conversation: at most {info.max_input_tokens} tokens.",
    }


def _describe(components: dict[str, Any], limits: dict[str, str]) -> None:
    """Write the notes into the request types' fields."""
    requests = ("GenerateParameters", "GenerateRequest", "CompatGenerateRequest", "ChatRequest", "CompletionRequest")
    for name in requests:
        for key, schema in components[name]["properties"].items():
            text = (NOTES.get(key, "") + limits.get(key, "")).strip()
            if text:
                schema["description"] = text
