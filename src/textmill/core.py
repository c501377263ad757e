"""The nouns that cross borders: plain frozen data, no behaviour, importable by every part (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Finish(IntEnum):
    """Why a request ended. The numbers are the wire's (`engine.proto`)."""

    NONE = 0
    LENGTH = 1
    EOS = 2
    STOP_SEQUENCE = 3  # decided by the router, which alone sees text
    CANCELLED = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the neutral value of every field switches that step off.

    `seed` is a full u64 and, with a token's absolute position, fixes its random number (counter-based stream).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    do_sample: bool = False
    seed: int = 0

    @property
    def draws(self) -> bool:
        """True if the token is drawn at random: asked for, or any warper differs from neutral (TGI's rule)."""
        return self.do_sample or self.temperature != 1.0 or self.top_k != 0 or self.top_p < 1.0 or self.typical_p < 1.0


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a prompt, cut and sized for the model's vision tower, and the tokens that stand for it.

    `pixels` are bytes [tiles, 3, height, width] (`shape`) in C order; a byte v of channel c means
    (v / 255 - mean[c]) / std[c]. `size` is (height, width) of the picture as it came. The prompt tokens
    `start` .. `start + count` stand for it. `digest` names everything but the place: equal digests, equal features.
    `until`: tokens from there on do not see it, where tokens see the image before them; 0: all do.
    """

    start: int
    count: int
    pixels: bytes
    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: bytes
    until: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One valid request for one sequence, as the engine sees it: token ids and numbers, no text.

    `stop_tokens` are the end-of-sequence ids (empty: ignore them). `prompt_logprobs` bypasses the prefix cache.
    `cache_salt` separates prefix-cache tenants (derived from the API key; equal salts may share blocks).
    `images` come in the order of their places, which do not overlap.
    `encoder_tokens` are what the encoder reads, for models that have one; `tokens` then begin the decoder's text.
    """

    id: int
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    prompt_logprobs: bool = False
    top_n_tokens: int = 0
    cache_salt: bytes = b""
    encoder_tokens: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token with its log-probability; `top` holds the best alternatives, best first, when asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Emission:
    """What one engine step brought one request: usually one token, always in order.

    `prompt_logprobs` comes once, with the first token: one entry per prompt token, the first is NaN.
    `queue_ns`, `cached_tokens` come with the first token. `finish` is NONE until the last emission.
    `error` is set only with `Finish.FAILED`.
    """

    request_id: int
    tokens: tuple[TokenChoice, ...] = ()
    finish: Finish = Finish.NONE
    prompt_logprobs: tuple[float, ...] | None = None
    queue_ns: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot of the runner: all its known tokens, how to sample, and what the encoder reads."""

    slot: int
    tokens: tuple[int, ...]
    sampling: Sampling
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    encoder_tokens: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotWork:
    """One slot's share of a step: compute tokens [start, start + count); then choose the next one if `samples`.

    A decode row's input token may be known to the runner only (it was sampled in the step before). `draft` holds
    guesses for the last tokens of the range, of which nothing is known yet; only work that samples may have them.
    """

    slot: int
    start: int
    count: int
    samples: bool
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration of the model over a batch of slots. The runner applies, in this order: `releases`,
    `admissions`, `blocks` (slot, index of the first new entry in its block table, block numbers), `work`.
    Steps run strictly in the order of their numbers."""

    number: int
    work: tuple[SlotWork, ...]
    admissions: tuple[Admission, ...] = ()
    releases: tuple[int, ...] = ()
    blocks: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome of one `SlotWork`. `token` is None where none was wanted.

    `more`: the tokens after `token`, in order: one for each guess of the draft that turned out right, up to the
    first that did not. They are the tokens that steps without a draft would have brought.

    `prompt_logprobs`: log-probabilities of the known tokens at positions start+1 .. start+count (as far as they
    are prompt), only for slots admitted with `prompt_logprobs`. `error`: this row alone failed (e.g. NaN logits).
    """

    slot: int
    token: TokenChoice | None
    prompt_logprobs: tuple[float, ...] = ()
    error: str = ""
    more: tuple[TokenChoice, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner brings back from a step; `sampled` is parallel to `Step.work`.

    `seconds` is all of the runner's time, `compute_seconds` the kernels' part of it.
    """

    number: int
    sampled: tuple[Sampled, ...]
    seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a runner can hold, known after warm-up. All counts; `block_size` in tokens.

    `reach`: no row reads keys or values so many or more tokens behind it, so blocks wholly behind that may be freed;
    0: rows read everything. `forward_only`: a slot keeps state that moves on with every token and cannot be taken
    back, nor found again from blocks: a sequence is computed from its first token on, in order, each token once.
    `encodes`: requests bring `encoder_tokens`. `sees`: requests may bring `images`.
    """

    block_size: int
    num_blocks: int
    max_slots: int
    max_step_tokens: int
    max_total_tokens: int
    vocab_size: int
    reach: int = 0
    forward_only: bool = False
    encodes: bool = False
    sees: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the blocks can serve.

        Where sequences leave blocks behind, one needs no more than its reach and two steps that are under way.
        """
        held = self.num_blocks * self.block_size
        needed = self.reach + 2 * (self.max_step_tokens + self.block_size)
        return self.max_total_tokens if self.reach and needed <= held else min(self.max_total_tokens, held)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine tells its routers: the served model and the limits that validation needs.

    `decoder_start_token_id`: with what the decoder's text begins where prompts go to an encoder; -1: there is none.
    """

    model_id: str
    model_path: str
    model_type: str
    revision: str
    dtype: str
    device: str
    quantize: str
    vocab_size: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    block_size: int
    num_blocks: int
    max_slots: int
    version: str
    decoder_start_token_id: int = -1
