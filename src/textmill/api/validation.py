"""TGI's rules for a request, in TGI's order and words (tgi.md 3.10), and the prompt's way to token ids."""

from __future__ import annotations

import asyncio
import random
import struct
from dataclasses import dataclass, replace

from textmill.api.schema import U64_MAX, GenerateParameters
from textmill.api.state import RouterState
from textmill.config import Settings
from textmill.core import Image, Request, Sampling
from textmill.errors import InvalidRequest

SHORT_TEXT = 2048  # characters; shorter texts are tokenized on the spot (well under a millisecond)
SEGMENT = 1024  # rule 15 counts at most so many new tokens, as TGI does
SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that derived seeds never meet
IMAGE_DATA = "![](data:image/"  # other Markdown is text to a model that sees nothing, as in TGI
FLOAT = struct.Struct("<f")
FLOAT_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Prompt:
    """A valid request for one prompt: what `sequence` needs to make an engine request of it.

    Where prompts go to an encoder, `encoder_ids` are the prompt's, and `ids` what the decoder's text begins with.
    """

    inputs: str
    ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    asked_new_tokens: int
    stop: tuple[str, ...] = ()
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    images: tuple[Image, ...] = ()
    encoder_ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of what the client sent."""
        return len(self.encoder_ids or self.ids)

    def seeds(self, count: int) -> list[Sampling]:
        """`count` ways to sample: the first with the prompt's own seed, the others with seeds derived from it."""
        first = self.sampling
        return [replace(first, seed=(first.seed + place * SEED_STEP) & U64_MAX) for place in range(count)]

    def request(self, request_id: int, sampling: Sampling, eos_ids: tuple[int, ...], salt: bytes) -> Request:
        return Request(
            id=request_id,
            tokens=self.ids,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            stop_tokens=() if self.ignore_eos else eos_ids,
            prompt_logprobs=self.prompt_logprobs,
            top_n_tokens=self.top_n_tokens,
            cache_salt=salt,
            images=self.images,
            encoder_tokens=self.encoder_ids,
        )


def check_best_of(best_of: int | None, settings: Settings) -> int:
    """Rules 0a and 0b; how many sequences to run."""
    count = best_of or 1
    if count > 1 and settings.max_best_of == 1:
        raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint")
    if count > settings.max_best_of:
        raise InvalidRequest(f"`best_of` must be > 0 and <= {settings.max_best_of}. Given: {count}")
    return count


def check_stream(parameters: GenerateParameters) -> None:
    """Rules s1 and s2: what a stream cannot have."""
    if parameters.best_of not in (None, 1):
        raise InvalidRequest("`best_of` != 1 is not supported when streaming tokens")
    if parameters.decoder_input_details:
        raise InvalidRequest("`decoder_input_details` == true is not supported when streaming tokens")


async def validate(
    state: RouterState, inputs: str, parameters: GenerateParameters, add_special_tokens: bool = True
) -> Prompt:
    """Rules 1 to 17; the tokenized prompt with every choice made (seed, length). Raises InvalidRequest."""
    numbers = _narrow(parameters)
    _check_sampling(numbers)
    _check_counts(numbers, state.settings)
    if not inputs:
        raise InvalidRequest("`inputs` cannot be empty")
    longest = state.info.max_input_tokens
    truncate = numbers.truncate
    if truncate is not None and not 0 < truncate <= longest:
        raise InvalidRequest(f"`truncate` must be strictly positive and less than {longest}. Given: {truncate}")
    ids, images = await prompt_tokens(state, inputs, add_special_tokens, truncate)
    start = state.info.decoder_start_token_id
    room = _check_length(ids, numbers.max_new_tokens, state)
    if numbers.grammar is not None:
        raise InvalidRequest("grammar is not supported")
    return Prompt(
        inputs=inputs,
        ids=ids if start < 0 else (start,),
        encoder_ids=() if start < 0 else ids,
        sampling=_sampling(numbers),
        max_new_tokens=min(room, numbers.max_new_tokens or room),
        asked_new_tokens=numbers.max_new_tokens or room,
        stop=tuple(stop for stop in numbers.stop if stop),
        top_n_tokens=numbers.top_n_tokens or 0,
        prompt_logprobs=numbers.decoder_input_details,
        ignore_eos=numbers.ignore_eos_token,
        images=images,
    )


async def prompt_tokens(
    state: RouterState, text: str, add_special_tokens: bool, truncate: int | None
) -> tuple[tuple[int, ...], tuple[Image, ...]]:
    """The last `truncate` token ids of a prompt, and the images that some of them stand for (rule 14b)."""
    sight = state.sight
    if sight is None:
        if IMAGE_DATA in text:
            raise InvalidRequest(f"image modality is not supported: {state.info.model_type} models take text only")
        ids = await tokenize(state, text, add_special_tokens)
        return (ids if truncate is None else ids[-truncate:]), ()
    shown = await sight.look(text)
    ids = await tokenize(state, shown.text, add_special_tokens)
    images = sight.place(shown, ids)
    if truncate is None or truncate >= len(ids):
        return ids, images
    return ids[-truncate:], sight.after_truncation(images, len(ids) - truncate)


async def tokenize(state: RouterState, text: str, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of a text; long texts are tokenized on a thread so that streams beside them go on."""
    tokenizer = state.tokenizer
    if len(text) <= SHORT_TEXT:
        return tuple(tokenizer.encode(text, add_special_tokens).ids)
    loop = asyncio.get_running_loop()
    encoding = await loop.run_in_executor(state.threads(), tokenizer.encode, text, add_special_tokens)
    return tuple(encoding.ids)


def _narrow(p: GenerateParameters) -> GenerateParameters:
    """The same with numbers as 32-bit floats, which is what TGI's rules see."""
    names = ("temperature", "repetition_penalty", "frequency_penalty", "top_p", "typical_p")
    for name in names:
        value = getattr(p, name)
        if value is not None:
            setattr(p, name, _float32(value))
    return p


def _float32(value: float) -> float:
    clamped = max(-FLOAT_MAX, min(FLOAT_MAX, value))
    narrow: float = FLOAT.unpack(FLOAT.pack(clamped))[0]
    return narrow


def _check_sampling(p: GenerateParameters) -> None:
    """Rules 1 to 7."""
    warped = any(one is not None for one in (p.temperature, p.top_k, p.top_p, p.typical_p))
    if (p.best_of or 1) > 1 and not (p.do_sample or warped):
        raise InvalidRequest("you must use sampling when `best_of` is > 1")
    if p.temperature is not None and p.temperature <= 0:
        raise InvalidRequest("`temperature` must be strictly positive")
    if p.repetition_penalty is not None and p.repetition_penalty <= 0:
        raise InvalidRequest("`repetition_penalty` must be strictly positive")
    if p.frequency_penalty is not None and not -2 <= p.frequency_penalty <= 2:
        raise InvalidRequest("`frequency_penalty` must be >= -2.0 and <= 2.0")
    if p.top_p is not None and not 0 < p.top_p < 1:
        raise InvalidRequest("`top_p` must be > 0.0 and < 1.0")
    if p.typical_p is not None and not 0 < p.typical_p < 1:
        raise InvalidRequest("`typical_p` must be > 0.0 and < 1.0")
    if p.top_k is not None and p.top_k <= 0:
        raise InvalidRequest("`top_k` must be strictly positive")


def _check_counts(p: GenerateParameters, settings: Settings) -> None:
    """Rules 8 to 11, then what is not built."""
    if p.max_new_tokens == 0:
        raise InvalidRequest("`max_new_tokens` must be strictly positive")
    if len(p.stop) > settings.max_stop_sequences:
        most = settings.max_stop_sequences
        raise InvalidRequest(f"`stop` supports up to {most} stop sequences. Given: {len(p.stop)}")
    if p.seed is not None and (p.best_of or 1) > 1:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1")
    if (p.top_n_tokens or 0) > settings.max_top_n_tokens:
        most = settings.max_top_n_tokens
        raise InvalidRequest(f"`top_n_tokens` must be >= 0 and <= {most}. Given: {p.top_n_tokens}")
    if p.watermark:
        raise InvalidRequest("`watermark` is not supported")
    if p.adapter_id is not None:
        raise InvalidRequest("`adapter_id` is not supported")


def _check_length(ids: tuple[int, ...], asked: int | None, state: RouterState) -> int:
    """Rules 15 and 16; how many tokens there is room for."""
    given, total, longest = len(ids), state.info.max_total_tokens, state.info.max_input_tokens
    if not ids:
        raise InvalidRequest("`inputs` cannot be empty")
    new = min(asked or max(total - given, 0), SEGMENT)
    if given + new > total:
        raise InvalidRequest(
            f"`inputs` tokens + `max_new_tokens` must be <= {total}. "
            f"Given: {given} `inputs` tokens and {new} `max_new_tokens`"
        )
    if given > longest:
        raise InvalidRequest(f"`inputs` must have less than {longest} tokens. Given: {given}")
    return total - given


def _sampling(p: GenerateParameters) -> Sampling:
    sampling = Sampling(
        temperature=1.0 if p.temperature is None else p.temperature,
        top_k=p.top_k or 0,
        top_p=1.0 if p.top_p is None else p.top_p,
        typical_p=1.0 if p.typical_p is None else p.typical_p,
        repetition_penalty=1.0 if p.repetition_penalty is None else p.repetition_penalty,
        frequency_penalty=0.0 if p.frequency_penalty is None else p.frequency_penalty,
        do_sample=p.do_sample,
    )
    if not sampling.draws:
        return sampling
    return replace(sampling, seed=random.getrandbits(64) if p.seed is None else p.seed)
