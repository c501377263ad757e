"""TGI's own routes: /generate, /generate_stream, / and /tokenize."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
from msgspec import UNSET

from textmill.api.calls import Call, Outlet, Sequence, Times
from textmill.api.decoding import decode
from textmill.api.exchange import ClientWatch, Exchange
from textmill.api.generation import Generation, TokenStep
from textmill.api.schema import (
    BestOfSequence,
    CompatGenerateRequest,
    Details,
    GenerateRequest,
    GenerateResponse,
    SimpleToken,
    StreamDetails,
    StreamResponse,
    Token,
)
from textmill.api.sse import EventStream, frame
from textmill.api.state import RouterState
from textmill.api.validation import SHORT_TEXT, check_best_of, check_stream, validate
from textmill.errors import IncompleteGeneration

GENERATE = msgspec.json.Decoder(GenerateRequest)
COMPAT = msgspec.json.Decoder(CompatGenerateRequest)


async def generate(exchange: Exchange) -> None:
    """POST /generate."""
    body = decode(GENERATE, await exchange.body())
    async with ClientWatch(exchange):
        await answer(exchange, body, in_list=False)


async def generate_stream(exchange: Exchange) -> None:
    """POST /generate_stream."""
    body = decode(GENERATE, await exchange.body())
    async with ClientWatch(exchange):
        await stream(exchange, body)


async def compat_generate(exchange: Exchange) -> None:
    """POST /: a stream, or a list with one answer; the full text is returned unless told otherwise."""
    body = decode(COMPAT, await exchange.body())
    if body.parameters.return_full_text is None:
        body.parameters.return_full_text = True
    async with ClientWatch(exchange):
        if body.stream:
            await stream(exchange, body)
        else:
            await answer(exchange, body, in_list=True)


async def answer(exchange: Exchange, body: GenerateRequest, in_list: bool) -> None:
    """Generate to the end and answer with everything at once."""
    state, parameters = exchange.state, body.parameters
    with Call(state, exchange.route, exchange.cache_salt()) as call:
        best_of = check_best_of(parameters.best_of, state.settings)
        call.admit(best_of)
        prompt = await validate(state, body.inputs, parameters)
        generations = await call.run(prompt, best_of)
        best, others = split_best(generations)
        text = (body.inputs if parameters.return_full_text else "") + best.text
        wanted = parameters.details or parameters.decoder_input_details
        response = GenerateResponse(text, details_of(best, others) if wanted else UNSET)
        headers = timing_headers(state, call.times, len(body.inputs), prompt.length, best.count)
        await exchange.json([response] if in_list else response, headers=headers)


def split_best(generations: list[Generation]) -> tuple[Generation, list[Generation]]:
    """The sequence with the largest mean log-probability (the first on ties), and the others in order."""
    best = max(generations, key=lambda one: one.mean_logprob)
    return best, [one for one in generations if one is not best]


def details_of(best: Generation, others: list[Generation]) -> Details:
    return Details(
        finish_reason=reason(best),
        generated_tokens=best.count,
        seed=best.seed,
        prefill=best.prefill(),
        tokens=[step.token for step in best.steps],
        best_of_sequences=[_loser(one) for one in others] or UNSET,
        top_tokens=_top_tokens(best) or UNSET,
    )


def _loser(generation: Generation) -> BestOfSequence:
    return BestOfSequence(
        generated_text=generation.text,
        finish_reason=reason(generation),
        generated_tokens=generation.count,
        seed=generation.seed,
        prefill=generation.prefill(),
        tokens=[step.token for step in generation.steps],
        top_tokens=_top_tokens(generation) or UNSET,
    )


def _top_tokens(generation: Generation) -> list[list[Token]]:
    if not generation.prompt.top_n_tokens:
        return []
    return [step.top for step in generation.steps]


def reason(generation: Generation) -> str:
    if generation.finish is None:
        raise IncompleteGeneration
    return generation.finish


def timing_headers(
    state: RouterState, times: Times, characters: int, prompt_tokens: int, generated: int
) -> list[tuple[bytes, bytes]]:
    """TGI's headers: seconds as a float, the rest in whole milliseconds."""
    numbers: dict[bytes, object] = {
        b"x-compute-type": state.compute_type,
        b"x-compute-time": times.total,
        b"x-compute-characters": characters,
        b"x-total-time": int(times.total * 1e3),
        b"x-validation-time": int(times.validation * 1e3),
        b"x-queue-time": int(times.queue * 1e3),
        b"x-inference-time": int(times.inference * 1e3),
        b"x-time-per-token": int(times.inference * 1e3 / max(generated, 1)),
        b"x-prompt-tokens": prompt_tokens,
        b"x-generated-tokens": generated,
    }
    return [(name, str(value).encode()) for name, value in numbers.items()]


def stream_headers(state: RouterState, characters: int) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-compute-type", state.compute_type.encode()),
        (b"x-compute-characters", str(characters).encode()),
    ]


async def stream(exchange: Exchange, body: GenerateRequest) -> None:
    """Generate with one event per token. Errors after this point are events: the status has been sent."""
    state = exchange.state
    state.refuse_if_down()
    async with EventStream(exchange, "native", stream_headers(state, len(body.inputs))) as events:
        with Call(state, exchange.route, exchange.cache_salt()) as call:
            check_stream(body.parameters)
            call.admit()
            prompt = await validate(state, body.inputs, body.parameters)
            [sequence] = call.queue(prompt, keep=False)
            formatter = NativeEvents(sequence, body)
            outlet = Outlet(events.ready, lambda new: events.push(formatter.frames(new)))
            async with aclosing(sequence.steps(outlet)) as steps:
                async for new in steps:
                    await events.send(formatter.frames(new))


class NativeEvents:
    """Turns steps into /generate_stream's events."""

    def __init__(self, sequence: Sequence, body: GenerateRequest) -> None:
        self.generation = sequence.generation
        self.input_length = sequence.prompt.length
        self.details = body.parameters.details
        self.before = body.inputs if body.parameters.return_full_text else ""
        self.index = 0

    def frames(self, steps: list[TokenStep]) -> bytes:
        ended = self.generation.finish is not None
        return b"".join([self._frame(step, ended and step is steps[-1]) for step in steps])

    def _frame(self, step: TokenStep, last: bool) -> bytes:
        self.index += 1
        event = StreamResponse(index=self.index, token=step.token, top_tokens=step.top or UNSET)
        if last:
            event.generated_text = self.before + self.generation.text
            if self.details:
                one = self.generation
                event.details = StreamDetails(reason(one), one.count, one.seed, self.input_length)
        return frame(event)


async def tokenize(exchange: Exchange) -> None:
    """POST /tokenize: a bare list of tokens with their places in bytes; special tokens always added."""
    body = decode(GENERATE, await exchange.body())
    await exchange.json(await simple_tokens(exchange.state, body.inputs, add_special_tokens=True))


async def simple_tokens(state: RouterState, text: str, add_special_tokens: bool) -> list[SimpleToken]:
    encode = state.tokenizer.encode
    if len(text) <= SHORT_TEXT:
        encoding = encode(text, add_special_tokens)
    else:
        loop = asyncio.get_running_loop()
        encoding = await loop.run_in_executor(state.threads(), encode, text, add_special_tokens)
    rows = zip(encoding.ids, encoding.texts, encoding.offsets, strict=True)
    return [SimpleToken(one, piece, start, stop) for one, piece, (start, stop) in rows]
