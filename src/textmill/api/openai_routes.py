"""OpenAI's routes in TGI's dialect: /v1/chat/completions, /v1/completions, and /chat_tokenize."""

from __future__ import annotations

from contextlib import ExitStack, aclosing

import msgspec

from textmill.api.calls import Call, Outlet, Sequence, all_or_none
from textmill.api.chat_prompt import chat_parameters, completion_parameters, refuse_unbuilt, templated
from textmill.api.decoding import decode
from textmill.api.exchange import ClientWatch, Exchange
from textmill.api.interleave import interleaved
from textmill.api.openai_format import ChatFormat, CompletionFormat, Heading, openai_reason, usage_of
from textmill.api.openai_schema import ChatRequest, CompletionChoice, CompletionRequest
from textmill.api.routes import simple_tokens, stream_headers, timing_headers
from textmill.api.schema import ChatTokenizeResponse
from textmill.api.sse import EventStream
from textmill.api.state import RouterState
from textmill.api.validation import validate
from textmill.errors import InvalidRequest, TextmillError

CHAT = msgspec.json.Decoder(ChatRequest)
COMPLETION = msgspec.json.Decoder(CompletionRequest)


class RouteError(TextmillError):
    """A refusal with a name of its own, as TGI has for this route."""

    status = 422

    def __init__(self, message: str, error_type: str) -> None:
        super().__init__(message)
        self.error_type = error_type


def heading(state: RouterState, model: str | None = None) -> Heading:
    """Any model name is accepted and echoed; none, or TGI's `tgi`, is ours."""
    name = state.model_name if model in (None, "tgi") else model
    return Heading(name or "", f"{state.info.version}-native")


def choices_asked(n: int | None, state: RouterState) -> int:
    most = state.settings.max_client_batch_size
    if n is not None and not 0 < n <= most:
        raise InvalidRequest(f"`n` must be > 0 and <= {most}. Given: {n}")
    return n or 1


async def chat(exchange: Exchange) -> None:
    """POST /v1/chat/completions. Template and tool errors come before a stream begins, and have a status."""
    body = decode(CHAT, await exchange.body())
    state = exchange.state
    async with ClientWatch(exchange):
        with Call(state, exchange.route, exchange.cache_salt()) as call:
            count = choices_asked(body.n, state)
            refuse_unbuilt(body)
            text = templated(state, body)
            if body.stream:
                await _chat_stream(exchange, call, body, text, count)
            else:
                await _chat_answer(exchange, call, body, text, count)


async def _chat_answer(exchange: Exchange, call: Call, body: ChatRequest, text: str, count: int) -> None:
    state = exchange.state
    call.admit(count)
    prompt = await validate(state, text, chat_parameters(body), add_special_tokens=False)
    generations = await call.run(prompt, count)
    style = ChatFormat(heading(state, body.model), bool(body.logprobs))
    length = prompt.length
    headers = timing_headers(state, call.times, len(text), length, call.generated)
    await exchange.json(style.whole(generations, length), headers=headers)


async def _chat_stream(exchange: Exchange, call: Call, body: ChatRequest, text: str, count: int) -> None:
    state = exchange.state
    state.refuse_if_down()
    async with EventStream(exchange, "openai", stream_headers(state, len(text))) as events:
        call.admit(count)
        prompt = await validate(state, text, chat_parameters(body), add_special_tokens=False)
        sequences = call.queue(prompt, count, keep=False)
        style = ChatFormat(heading(state, body.model), bool(body.logprobs))
        await _send_all(events, sequences, style)
        if body.stream_options is not None and body.stream_options.include_usage:
            await events.send(style.usage_frame(prompt.length, call.generated))


async def _send_all(events: EventStream, sequences: list[Sequence], style: ChatFormat | CompletionFormat) -> None:
    """Every sequence's steps as events, until all have ended."""
    if len(sequences) == 1:
        generation = sequences[0].generation
        outlet = Outlet(events.ready, lambda new: events.push(style.frames(0, generation, new)))
        async with aclosing(sequences[0].steps(outlet)) as steps:
            async for new in steps:
                await events.send(style.frames(0, generation, new))
        return
    async with aclosing(interleaved(sequences)) as items:
        async for place, new in items:
            await events.send(style.frames(place, sequences[place].generation, new))


async def completions(exchange: Exchange) -> None:
    """POST /v1/completions: one call per prompt, answered together or interleaved."""
    body = decode(COMPLETION, await exchange.body())
    state = exchange.state
    if body.suffix is not None:
        text = "Suffix is not supported and can be achieved by preprocessing the prompt."
        raise RouteError(text, "suffix not supported")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    most = state.settings.max_client_batch_size
    if len(prompts) > most:
        text = f"Number of prompts exceeds the maximum allowed batch size of {most}"
        raise RouteError(text, "batch size exceeded")
    async with ClientWatch(exchange):
        with ExitStack() as stack:
            calls = [stack.enter_context(Call(state, exchange.route, exchange.cache_salt())) for _ in prompts]
            if body.stream:
                await _completion_stream(exchange, calls, body, prompts)
            else:
                await _completion_answer(exchange, calls, body, prompts)


async def _queued(state: RouterState, calls: list[Call], body: CompletionRequest, prompts: list[str]) -> list[Sequence]:
    """All prompts admitted, then all validated: their sequences in the order of the choices."""
    count = choices_asked(body.n, state)
    for call in calls:
        call.admit(count)
    sequences: list[Sequence] = []
    for call, text in zip(calls, prompts, strict=True):
        prompt = await validate(state, text, completion_parameters(body))
        sequences += call.queue(prompt, count, keep=False)
    return sequences


async def _completion_answer(
    exchange: Exchange, calls: list[Call], body: CompletionRequest, prompts: list[str]
) -> None:
    state = exchange.state
    sequences = await _queued(state, calls, body, prompts)
    generations = await all_or_none([one.run() for one in sequences])
    choices = [
        CompletionChoice(index=index, text=one.text, finish_reason=openai_reason(one))
        for index, one in enumerate(generations)
    ]
    given = sum(call.prompt.length for call in calls if call.prompt is not None)
    generated = sum(one.count for one in generations)
    answer = CompletionFormat(heading(state)).whole(choices, usage_of(given, generated))
    await exchange.json(answer, headers=_summed_headers(state, calls, prompts))


def _summed_headers(state: RouterState, calls: list[Call], prompts: list[str]) -> list[tuple[bytes, bytes]]:
    """The headers of all calls added up; the type is the first one's, and there is no compute time."""
    rows = [
        timing_headers(state, call.times, len(text), call.prompt.length, call.generated)
        for call, text in zip(calls, prompts, strict=True)
        if call.prompt is not None
    ]
    names = [name for name, _ in rows[0] if name not in (b"x-compute-type", b"x-compute-time")]
    sums = [(name, str(sum(int(dict(row)[name]) for row in rows)).encode()) for name in names]
    return [rows[0][0], *sums]


async def _completion_stream(
    exchange: Exchange, calls: list[Call], body: CompletionRequest, prompts: list[str]
) -> None:
    state = exchange.state
    state.refuse_if_down()
    characters = sum(len(text) for text in prompts)
    async with EventStream(exchange, "openai", stream_headers(state, characters)) as events:
        sequences = await _queued(state, calls, body, prompts)
        await _send_all(events, sequences, CompletionFormat(heading(state)))


async def chat_tokenize(exchange: Exchange) -> None:
    """POST /chat_tokenize: the templated text and its tokens, without special tokens around it."""
    body = decode(CHAT, await exchange.body())
    text = templated(exchange.state, body)
    tokens = await simple_tokens(exchange.state, text, add_special_tokens=False)
    await exchange.json(ChatTokenizeResponse(tokens, text))
