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
from textmill.api.sse import frame
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
            frame(self._chunk(index, step, openai_reason(generation) if ended and step is steps[-1] else None))
            for step in steps
        )

    def _chunk(self, index: int, step: TokenStep, reason: str | None) -> ChatChunk:
        logprobs = logprobs_of([step]) if self.logprobs else None
        choice = ChunkChoice(index, AnswerMessage(content=step.text), logprobs, reason)
        return self._with([choice])

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
            self._last(index, step, generation) if ended and step is steps[-1] else self._chunk(index, step)
            for step in steps
        )

    def _chunk(self, index: int, step: TokenStep) -> bytes:
        head = self.heading
        return frame(
            CompletionChunk(
                created=head.created,
                model=head.model,
                system_fingerprint=head.system_fingerprint,
                choices=[CompletionChoice(index=index, text=step.text, finish_reason="")],
            )
        )

    def _last(self, index: int, step: TokenStep, generation: Generation) -> bytes:
        choice = CompletionChoice(index=index, text=step.text, finish_reason=generation.finish or "")
        return frame(self.whole([choice], usage_of(generation.prompt.length, generation.count)))
