"""TGI's own request and response bodies: fields, defaults, null rules and key order as its clients know them."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, field

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Size = Annotated[int, Meta(ge=0, le=2**63 - 1)]
U64_MAX = 2**64 - 1


def check_u64(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= U64_MAX:
        raise ValueError(f"invalid value: integer `{value}`, expected u64 for `{name}`")


class GenerateParameters(Struct, kw_only=True):
    """How to generate. With `parameters` absent as a whole, `do_sample` is true."""

    best_of: Size | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: I32 | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = field(default_factory=list)
    truncate: Size | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: U32 | None = None
    grammar: Any = None
    adapter_id: str | None = None
    ignore_eos_token: bool = False

    def __post_init__(self) -> None:
        check_u64("seed", self.seed)


def default_parameters() -> GenerateParameters:
    return GenerateParameters(do_sample=True)


class GenerateRequest(Struct, kw_only=True):
    """Body of /generate, /generate_stream and /tokenize."""

    inputs: str
    parameters: GenerateParameters = field(default_factory=default_parameters)


class CompatGenerateRequest(GenerateRequest, kw_only=True):
    """Body of POST /: the same, and whether to stream."""

    stream: bool = False


class Token(Struct):
    """A generated token; `logprob` is null where it is not a finite number."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(Struct):
    """A prompt token; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(Struct, kw_only=True):
    """A sequence that lost against the best one."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, kw_only=True):
    """What was computed for an answer."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct):
    """Answer of /generate."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct):
    """What the last event says about a stream."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, kw_only=True):
    """One event of a native stream; `generated_text` and `details` are null but on the last."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(Struct):
    """A token of a text, with its place in bytes."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct):
    """Answer of /chat_tokenize."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class ErrorResponse(Struct):
    """Every error that is JSON."""

    error: str
    error_type: str


class Info(Struct, kw_only=True):
    """Answer of /info."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
