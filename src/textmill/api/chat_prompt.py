"""From an OpenAI-shaped request to a prompt text and TGI's parameters."""

from __future__ import annotations

from typing import Any

import msgspec

from textmill.api.openai_schema import ChatRequest, CompletionRequest, ImagePart, Message, ToolCall
from textmill.api.schema import GenerateParameters
from textmill.api.state import RouterState
from textmill.errors import InvalidRequest, TemplateFailed, ToolFailed
from textmill.text.chat import image_markdown


def refuse_unbuilt(body: ChatRequest) -> None:
    """What this server cannot do yet is refused by name."""
    if body.tools and body.tool_choice != "none":
        raise ToolFailed("`tools` are not supported")
    kind = body.response_format
    if kind is not None and kind != {"type": "text"}:
        raise InvalidRequest("grammar is not supported")
    if body.logit_bias:
        raise InvalidRequest("`logit_bias` is not supported")


def templated(state: RouterState, body: ChatRequest) -> str:
    """The conversation as the model's chat template writes it. Raises TemplateFailed, InvalidRequest."""
    if state.chat_template is None:
        raise TemplateFailed("template not found")
    messages = [message_of(one) for one in body.messages]
    addresses = [part.image_url.url for part in image_parts(body)]
    if state.sight is None:
        if addresses:
            raise InvalidRequest(f"image modality is not supported: {state.info.model_type} models take text only")
        return state.chat_template.render(messages)
    if not state.chat_template.uses_parts:
        return state.chat_template.render(messages)  # images are Markdown in its text
    return addressed(state.chat_template.render(messages, parts=True), addresses, state.sight.token)


def image_parts(body: ChatRequest) -> list[ImagePart]:
    parts = [part for one in body.messages if isinstance(one.content, list) for part in one.content]
    return [part for part in parts if isinstance(part, ImagePart)]


def addressed(text: str, addresses: list[str], token: str) -> str:
    """The text with the template's image tokens, in order, as Markdown again. InvalidRequest if there are others."""
    pieces = text.split(token)
    if len(pieces) != len(addresses) + 1:
        shown = len(pieces) - 1
        raise InvalidRequest(
            f"`messages` have {len(addresses)} images, but their text or template has {token} {shown} times"
        )
    marked = [piece + image_markdown(address) for piece, address in zip(pieces, addresses, strict=False)]
    return "".join((*marked, pieces[-1]))


def message_of(message: Message) -> dict[str, Any]:
    """A message as the template wants it. Arguments of tool calls become JSON text."""
    if message.content is not None:
        return {"role": message.role, "content": msgspec.to_builtins(message.content)}
    return {"role": message.role, "tool_calls": [_call(one) for one in message.tool_calls or []]}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    function = {"description": call.function.description, "name": call.function.name, "arguments": text}
    return {"id": call.id, "type": call.type, "function": function}


def chat_parameters(body: ChatRequest) -> GenerateParameters:
    parameters = _shared(body)
    parameters.repetition_penalty = _repetition_penalty(body.presence_penalty)
    parameters.max_new_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    parameters.top_n_tokens = body.top_logprobs
    return parameters


def completion_parameters(body: CompletionRequest) -> GenerateParameters:
    parameters = _shared(body)
    parameters.repetition_penalty = body.repetition_penalty
    parameters.max_new_tokens = body.max_tokens
    return parameters


def _shared(body: ChatRequest | CompletionRequest) -> GenerateParameters:
    """TGI's reading: a temperature of exactly 0 is greedy, anything else samples; top_p 1 is the same as none."""
    greedy = body.temperature == 0
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerateParameters(
        temperature=None if greedy else body.temperature,
        do_sample=not greedy,
        top_p=None if body.top_p == 1 else body.top_p,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        stop=stop,
        details=True,
        ignore_eos_token=body.ignore_eos or body.ignore_eos_token,
    )


def _repetition_penalty(presence: float | None) -> float | None:
    """TGI adds 2 to a presence penalty and takes it as a repetition penalty; 0, which many clients send, is off."""
    return None if not presence else presence + 2.0
