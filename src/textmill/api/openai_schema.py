"""OpenAI's request and answer bodies as TGI reads and writes them, and a little more (`stop` as a string, `n`)."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from textmill.api.schema import U32, check_u64

NO_VARIANT = "data did not match any variant of untagged enum MessageBody"
EMPTY_PROMPTS = "Empty array detected. Do not use an empty array for the prompt."


class TextPart(Struct, tag_field="type", tag="text"):
    """A part of a message."""

    text: str


class ImageUrl(Struct):
    url: str


class ImagePart(Struct, tag_field="type", tag="image_url"):
    """A picture by address, for models that see."""

    image_url: ImageUrl


class FunctionCall(Struct, kw_only=True):
    description: str | None = None
    name: str
    arguments: Any


class ToolCall(Struct):
    id: str
    type: str
    function: FunctionCall


class Message(Struct, kw_only=True):
    """One turn: `content`, or the `tool_calls` that an assistant made."""

    role: str
    content: str | list[TextPart | ImagePart] | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.tool_calls is None:
            raise ValueError(NO_VARIANT)


class StreamOptions(Struct):
    include_usage: bool = False


class ChatRequest(Struct, kw_only=True):
    """Body of /v1/chat/completions. Without `temperature` tokens are sampled at 1.0; 0 is greedy."""

    messages: list[Message]
    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | list[float] | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    max_tokens: U32 | None = None
    max_completion_tokens: U32 | None = None
    n: U32 | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Any] | None = None
    tool_prompt: str | None = None
    tool_choice: Any = None
    response_format: Any = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    ignore_eos_token: bool = False

    def __post_init__(self) -> None:
        check_u64("seed", self.seed)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("duplicate field `max_tokens`")


class CompletionRequest(Struct, kw_only=True):
    """Body of /v1/completions: one prompt or several."""

    prompt: str | list[str]
    model: str | None = None
    max_tokens: U32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    suffix: str | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    n: U32 | None = None
    ignore_eos: bool = False
    ignore_eos_token: bool = False

    def __post_init__(self) -> None:
        check_u64("seed", self.seed)
        if self.prompt == []:
            raise ValueError(EMPTY_PROMPTS)


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Struct):
    token: str
    logprob: float | None


class TokenLogprob(Struct):
    token: str
    logprob: float | None
    top_logprobs: list[TopLogprob]


class Logprobs(Struct):
    content: list[TokenLogprob]


class AnswerMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str = ""


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(Struct, kw_only=True):
    """Answer of /v1/chat/completions."""

    object: str = "chat.completion"
    id: str = ""
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(Struct):
    index: int
    delta: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatChunk(Struct, kw_only=True):
    """One event of a chat stream."""

    object: str = "chat.completion.chunk"
    id: str = ""
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: list[float] | None = None
    finish_reason: str


class Completion(Struct, kw_only=True):
    """Answer of /v1/completions, and the last event of each choice of its stream."""

    object: str = "text_completion"
    id: str = ""
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class CompletionChunk(Struct, kw_only=True):
    """One event of a completion stream before the last of its choice."""

    object: str = "text_completion"
    id: str = ""
    created: int
    choices: list[CompletionChoice] = field(default_factory=list)
    model: str
    system_fingerprint: str
