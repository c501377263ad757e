"""One request in flight: the tokens known, and how many of them are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from textmill.core import Emission, Finish, Request
from textmill.speculate.policy import Guesser

Sink = Callable[[int, list[Emission]], None]
"""Takes (steps finished so far, emissions); called at most once per step, must not block."""


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's view of a request. `number` is its place in the order of arrival, `owner` whom its tokens go to.

    `computed` counts tokens whose keys and values are planned or stored, `settled` those whose step has come back.
    `in_flight` counts sampled tokens not yet seen. `residency` numbers its stays in a slot: a row planned in an
    earlier stay says nothing about the blocks of this one.
    """

    request: Request
    number: int
    limit: int  # of known tokens: prompt and output together
    owner: Sink = field(default=lambda step, emissions: None)
    submitted_ns: int = 0
    tokens: list[int] = field(init=False)
    state: State = State.WAITING
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    left: int = 0  # the first so many of them are given back already (`engine.windows`)
    computed: int = 0
    settled: int = 0
    in_flight: int = 0
    residency: int = 0
    last_step: int = 0
    started: bool = False  # its first token has been handed over
    queue_ns: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)  # digests of its full blocks, as far as known
    registered: int = 0  # blocks of this stay that the prefix cache has been told of
    guesser: Guesser | None = None  # from its second token on, if the engine speculates

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    @property
    def held(self) -> list[int]:
        """The blocks that are its own now."""
        return self.blocks[self.left :] if self.left else self.blocks

    @property
    def planned_length(self) -> int:
        """Tokens known or on their way."""
        return len(self.tokens) + self.in_flight

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.prompt_logprobs and not self.started

    def append(self, token: int) -> Finish:
        """Take a sampled token; says whether it is the last (TGI's order: the length is looked at first)."""
        self.tokens.append(token)
        if len(self.tokens) >= self.limit:
            return Finish.LENGTH
        return Finish.EOS if token in self.request.stop_tokens else Finish.NONE
