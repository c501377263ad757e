"""A response as a small state machine: fed one emission at a time, it gives text, tokens and the reason to end.

Streams and plain answers run the same machine, so the concatenated stream is the plain answer.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

from textmill.api.schema import PrefillToken, Token
from textmill.api.validation import Prompt
from textmill.core import Emission, Finish, TokenChoice
from textmill.errors import GenerationFailed
from textmill.text.detokenize import StreamDecoder
from textmill.text.stopping import StopMatcher
from textmill.text.tokenizer import Tokenizer

FINISH_NAMES = {Finish.LENGTH: "length", Finish.EOS: "eos_token", Finish.STOP_SEQUENCE: "stop_sequence"}
FLOAT = struct.Struct("<f")
FORMS = ("%.6g", "%.7g", "%.8g", "%.9g")


def shortest(value: float) -> float | None:
    """The double that prints as the shortest decimal of a 32-bit float; None for what is not finite."""
    if not math.isfinite(value):
        return None
    wanted = FLOAT.pack(value)
    for form in FORMS:
        short = float(form % value)
        if FLOAT.pack(short) == wanted:
            return short
    return value


@dataclass(slots=True)
class TokenStep:
    """One token as clients see it; the parts that only some of them ask for are made when they are.

    `piece` is its own text, `text` what it adds to the visible text (special tokens add nothing).
    """

    tokenizer: Tokenizer
    choice: TokenChoice
    piece: str
    text: str
    special: bool

    @property
    def token(self) -> Token:
        return Token(self.choice.id, self.piece, shortest(self.choice.logprob), self.special)

    @property
    def top(self) -> list[Token]:
        """The best alternatives."""
        tokenizer = self.tokenizer
        return [
            Token(one, tokenizer.token_text(one), shortest(logprob), tokenizer.is_special(one))
            for one, logprob in self.choice.top
        ]


@dataclass(slots=True)
class Generation:
    """One sequence's response so far. `finish` is set once, by the last emission or by a stop string."""

    tokenizer: Tokenizer
    prompt: Prompt
    seed: int | None
    keep: bool = True  # whether to remember the steps (a stream does not)
    steps: list[TokenStep] = field(default_factory=list)
    finish: str | None = None
    matched: bool = False
    count: int = 0
    logprob_sum: float = 0.0
    prompt_logprobs: tuple[float, ...] | None = None
    pieces: list[str] = field(default_factory=list)
    decoder: StreamDecoder = field(init=False)
    matcher: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = StreamDecoder(self.tokenizer, self.prompt.ids)
        self.matcher = StopMatcher(self.prompt.stop)

    @property
    def text(self) -> str:
        """The visible text so far; the matched stop string is part of it, and nothing after it."""
        return "".join(self.pieces)

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / self.count if self.count else -math.inf

    def push(self, emission: Emission) -> list[TokenStep]:
        """The steps that an emission brings. Raises GenerationFailed when the engine gave up on the sequence."""
        if emission.finish is Finish.FAILED:
            raise GenerationFailed(emission.error or "the engine failed")
        if emission.finish is Finish.CANCELLED:
            raise GenerationFailed(emission.error or "the engine ended the request")
        if emission.prompt_logprobs is not None:
            self.prompt_logprobs = emission.prompt_logprobs
        new: list[TokenStep] = []
        for place, choice in enumerate(emission.tokens):
            new.append(self._step(choice))
            if self._stopped(place + 1 == len(emission.tokens), emission.finish):
                break
        else:
            self._end(emission, new)
        if self.keep and emission.tokens:
            self.steps += new
        return new

    def _stopped(self, last: bool, finish: Finish) -> bool:
        """TGI's order: length and end-of-sequence come before a stop string that ends at the same token."""
        if not self.matched or (last and finish is not Finish.NONE):
            return False
        self.finish = FINISH_NAMES[Finish.STOP_SEQUENCE]
        return True

    def _step(self, choice: TokenChoice) -> TokenStep:
        self.count += 1
        self.logprob_sum += choice.logprob
        piece = self.decoder.push(choice.id)
        if self.prompt.stop:
            piece, self.matched = self.matcher.push_piece(piece)
        if piece.visible:
            self.pieces.append(piece.visible)
        return TokenStep(self.tokenizer, choice, piece.text, piece.visible, self.tokenizer.is_special(choice.id))

    def _end(self, emission: Emission, new: list[TokenStep]) -> None:
        """The last emission: text held back for incomplete characters comes out with the last token."""
        if emission.finish is Finish.NONE:
            return
        self.finish = FINISH_NAMES[emission.finish]
        tail, self.matched = self.matcher.push(self.decoder.flush())
        self.pieces.append(tail)
        if not new:  # an end without a token: an empty one carries the end of the stream
            new.append(TokenStep(self.tokenizer, TokenChoice(self.prompt.ids[-1], math.nan), "", "", False))
        last = new[-1]
        last.text += tail
        if not last.special:
            last.piece += tail

    def prefill(self) -> list[PrefillToken]:
        """The prompt's tokens with their log-probabilities, where they were asked for."""
        if self.prompt_logprobs is None:
            return []
        pairs = zip(self.prompt.ids, self.prompt_logprobs, strict=False)
        return [PrefillToken(one, self.tokenizer.token_text(one), shortest(logprob)) for one, logprob in pairs]
