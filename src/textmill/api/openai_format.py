"""From steps and generations to OpenAI's shapes, as TGI fills them in."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import time

from textmill.api.generation import Generation, TokenStep
from textmill.api.openai_schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionChunk,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from textmill.api.sse import Mould, frame
from textmill.errors import IncompleteGeneration


def openai_reason(generation: Generation) -> str:
    """TGI's names: `stop` for the end of the text, `length`, `stop_sequence`."""
    if generation.finish is None:
        raise IncompleteGeneration
    return "stop" if generation.finish == "eos_token" else generation.finish


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


def logprobs_of(steps: list[TokenStep]) -> Logprobs:
    return Logprobs(
        [
            TokenLogprob(step.token.text, step.token.logprob, [TopLogprob(one.text, one.logprob) for one in step.top])
            for step in steps
        ]
    )


@dataclass(slots=True)
class Heading:
    """What every object of one answer repeats."""

    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time()))


class ChatFormat:
    """Chat completions and their chunks."""

    def __init__(self, heading: Heading, logprobs: bool) -> None:
        self.heading = heading
        self.logprobs = logprobs
        self.moulds: dict[int, Mould] = {}

    def whole(self, generations: list[Generation], prompt_tokens: int) -> ChatCompletion:
        choices = [
            ChatChoice(
                index,
                AnswerMessage(content=one.text),
                logprobs_of(one.steps) if self.logprobs else None,
                openai_reason(one),
            )
            for index, one in enumerate(generations)
        ]
        head = self.heading
        return ChatCompletion(
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage_of(prompt_tokens, sum(one.count for one in generations)),
        )

    def frames(self, index: int, generation: Generation, steps: list[TokenStep]) -> bytes:
        """One chunk per token; the last token's carries the reason."""
        ended = generation.finish is not None
        return b"".join(
            [
                self._frame(index, step, openai_reason(generation) if ended and step is steps[-1] else None)
                for step in steps
            ]
        )

    def _frame(self, index: int, step: TokenStep, reason: str | None) -> bytes:
        if self.logprobs or reason is not None:
            return frame(self._chunk(index, step.text, logprobs_of([step]) if self.logprobs else None, reason))
        mould = self.moulds.get(index)
        if mould is None:
            mould = self.moulds[index] = Mould(lambda text: self._chunk(index, text))
        return mould.frame(step.text)

    def _chunk(self, index: int, text: str, logprobs: Logprobs | None = None, reason: str | None = None) -> ChatChunk:
        return self._with([ChunkChoice(index, AnswerMessage(content=text), logprobs, reason)])

    def _with(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        head = self.heading
        return ChatChunk(
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def usage_frame(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        return frame(self._with([], usage_of(prompt_tokens, completion_tokens)))


class CompletionFormat:
    """Text completions and their chunks."""

    def __init__(self, heading: Heading) -> None:
        self.heading = heading
        self.moulds: dict[int, Mould] = {}

    def whole(self, choices: list[CompletionChoice], usage: Usage) -> Completion:
        head = self.heading
        return Completion(
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def frames(self, index: int, generation: Generation, steps: list[TokenStep]) -> bytes:
        """One chunk per token; the last one of a choice names the raw reason and its usage."""
        ended = generation.finish is not None
        return b"".join(
            [
                self._last(index, step, generation) if ended and step is steps[-1] else self._frame(index, step)
                for step in steps
            ]
        )

    def _frame(self, index: int, step: TokenStep) -> bytes:
        mould = self.moulds.get(index)
        if mould is None:
            mould = self.moulds[index] = Mould(lambda text: self._chunk(index, text))
        return mould.frame(step.text)

    def _chunk(self, index: int, text: str) -> CompletionChunk:
        head = self.heading
        return CompletionChunk(
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=[CompletionChoice(index=index, text=text, finish_reason="")],
        )

    def _last(self, index: int, step: TokenStep, generation: Generation) -> bytes:
        choice = CompletionChoice(index=index, text=step.text, finish_reason=generation.finish or "")
        return frame(self.whole([choice], usage_of(generation.prompt.length, generation.count)))
