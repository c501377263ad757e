"""A scripted engine, a small real tokenizer (byte-level BPE, made here), and readers of streams."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from textmill.api.engine import Take
from textmill.api.permits import LocalPermits
from textmill.api.state import RouterState
from textmill.core import Emission, EngineInfo, Finish, Request, TokenChoice
from textmill.text.tokenizer import Tokenizer

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", ". Ċ", "n d", "e nd"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
INFO = EngineInfo(
    model_id="test/model",
    model_path="",
    model_type="llama",
    revision="",
    dtype="float32",
    device="cpu",
    quantize="",
    vocab_size=300,
    max_input_tokens=40,
    max_total_tokens=200,
    max_batch_prefill_tokens=64,
    max_batch_total_tokens=640,
    block_size=16,
    num_blocks=40,
    max_slots=8,
    version="0.1.0",
)


def write_tokenizer(folder: Path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    for merge in MERGES:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Health:
    step: int = 1
    step_age_ns: int = 0
    working: bool = False
    draining: bool = False


Script = Callable[[Request], list[Emission]]


@dataclass
class ScriptedEngine:
    """Says what it is told to. With `gate` set, each emission waits for a permit of it; `pace` is a pause before it."""

    tokenizer: Tokenizer
    script: Script | None = None
    connected: bool = True
    state: Health = field(default_factory=Health)
    requests: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    gate: asyncio.Semaphore | None = None
    pace: float = 0.0
    taken: int = 0  # emissions that went out at once
    figures: dict[str, float] = field(default_factory=dict)

    def says(self, text: str, finish: Finish = Finish.EOS, logprob: float = -0.5) -> None:
        """Answer every request with this text, token by token."""
        ids = self.tokenizer.encode(text, False).ids
        self.says_ids(ids, finish, logprob)

    def says_ids(self, ids: list[int], finish: Finish = Finish.EOS, logprob: float = -0.5) -> None:
        if finish is Finish.EOS:
            ids = [*ids, self.tokenizer.eos_ids[0]]

        def script(request: Request) -> list[Emission]:
            top = ((ids[0], -0.25), (ids[-1], -1.5))[: request.top_n_tokens]
            emissions = [Emission(request.id, (TokenChoice(one, logprob, top),)) for one in ids]
            prompt = tuple(-float(place) for place in range(len(request.tokens)))
            extra = (math.nan, *prompt[1:]) if request.prompt_logprobs else None
            emissions[0] = replace(emissions[0], prompt_logprobs=extra, queue_ns=1_000_000)
            emissions[-1] = replace(emissions[-1], finish=finish)
            return emissions[: request.max_new_tokens]

        self.script = script

    async def info(self) -> EngineInfo:
        return INFO

    async def health(self) -> Health:
        return self.state

    async def stats(self) -> dict[str, float]:
        return self.figures

    async def generate(self, request: Request, take: Take | None = None) -> AsyncGenerator[Emission, None]:
        assert self.script is not None
        self.requests.append(request)
        finished = False
        try:
            for emission in self.script(request):
                if self.gate is not None:
                    await self.gate.acquire()
                await asyncio.sleep(self.pace)
                finished = emission.finish is not Finish.NONE
                if take is not None and take(emission):
                    self.taken += 1
                    continue
                yield emission
        finally:
            self.closed.append(request.id)
            if not finished:
                self.cancelled.append(request.id)


def balance(state: RouterState) -> dict[str, int]:
    """The ledger's counts, after checking that they add up and that all permits are back."""
    ledger = state.metrics.ledger
    names = ("accepted", "completed", "failed", "cancelled", "rejected")
    counts = {name: ledger.count(name) for name in names}
    assert counts["accepted"] == counts["completed"] + counts["failed"] + counts["cancelled"] + ledger.open
    assert ledger.open == 0
    assert isinstance(state.permits, LocalPermits)
    assert state.permits.free == state.settings.max_concurrent_requests
    return counts


def events(text: str) -> list[Any]:
    """The events of a stream; `[DONE]` stays a string."""
    assert text == "" or text.endswith("\n\n")
    found = []
    for block in text.split("\n\n")[:-1]:
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


@dataclass
class Live:
    """The app on a real port."""

    state: RouterState
    port: int
    task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, path: str, body: bytes | dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connect()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        return reader, writer


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)
