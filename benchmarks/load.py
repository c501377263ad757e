"""A closed-loop load generator for /v1/completions streams: exact token counts, times per token, little overhead.

Also the figures made of what clients saw; engines without a server take their prompts and figures from here too.

Speaks HTTP/1.1 on a plain asyncio socket and looks no closer at an event than it must, so that on a small machine the
generator does not become what is measured. Prompts are common English words, one token each in byte-pair
vocabularies; every prompt differs from its first word on unless a shared prefix is asked for.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

WORDS = (  # noqa: SIM905 - words read better than quoted items
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house service "
    "friend father power hour game line end member law car city community name president team minute idea body "
    "information back parent face others level office door health person art war history party result change morning"
).split()

ARRIVAL_AFTER_S = 1.5  # how long streams run in quiet before a long prompt arrives beside them

ROOM = 1 << 16  # bytes taken from a socket at once
# In an event that carries a token, as our server and llama-server write it; never inside a string.
TOKEN = b'"choices":[{'

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\nConnection: close\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients do: `clients` at once, `requests` in all, fixed lengths, end-of-sequence ignored."""

    clients: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0
    seed: str = ""


@dataclass(slots=True)
class Answer:
    """What one client saw of one request; times in perf_counter seconds."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def prompts(load: Load) -> list[str]:
    generator = random.Random(load.seed)

    def words(count: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(count))

    shared = words(load.shared_prefix_tokens) + " " if load.shared_prefix_tokens else ""
    return [shared + words(load.prompt_tokens) for _ in range(load.requests)]


class Reading(asyncio.BufferedProtocol):
    """Takes one streamed answer apart as it arrives: lines of events, whatever frames (chunked or not) are between."""

    def __init__(self, answer: Answer, wanted: int, payload: bytes) -> None:
        self.answer = answer
        self.wanted = wanted
        self.payload = payload
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room = memoryview(bytearray(ROOM))
        self._kept = b""  # the line that has not ended yet
        self._status = b""
        self._refused: list[bytes] = []  # the lines of an answer that is none

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.payload)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        now = time.perf_counter()
        *lines, self._kept = (self._kept + self._room[:nbytes]).split(b"\n")
        if not self._status and lines:
            self._status = lines[0]
        if b" 200 " not in self._status:
            self._refused += lines
            return
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line, now)

    def _event(self, line: bytes, now: float) -> None:
        """Reads only as much as it must: a token's event shows by its bytes, any other is parsed."""
        token = TOKEN in line and b'"error"' not in line
        if not token and b"[DONE]" not in line:
            event = json.loads(line[5:])
            token = not event.get("error") and bool(event.get("choices"))
            if event.get("error"):
                self.answer.error = json.dumps(event["error"])[:300]
        if token and len(self.answer.arrivals) < self.wanted:
            self.answer.arrivals.append(now)

    def connection_lost(self, error: Exception | None) -> None:
        if b" 200 " not in self._status:
            self.answer.error = b"\n".join([*self._refused, self._kept]).decode(errors="replace")[:300]
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


async def ask(port: int, prompt: str, output_tokens: int, extra: dict[str, object]) -> Answer:
    """One streamed completion on a connection of its own."""
    body = {"model": "tgi", "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "stream": True} | extra
    content = json.dumps(body).encode()
    payload = HEAD.format(length=len(content)).encode() + content
    answer = Answer(time.perf_counter())
    loop = asyncio.get_running_loop()
    transport, reading = await loop.create_connection(
        lambda: Reading(answer, output_tokens, payload), "127.0.0.1", port
    )
    try:
        await reading.ended
    finally:
        transport.close()
    if not answer.arrivals and not answer.error:
        answer.error = "the stream carried no token"
    return answer


async def run(port: int, load: Load, extra: dict[str, object]) -> tuple[list[Answer], float]:
    """All answers and the wall time in seconds."""
    waiting = iter(prompts(load))
    answers: list[Answer] = []

    async def client() -> None:
        for prompt in waiting:
            answer = await ask(port, prompt, load.output_tokens, extra)
            answers.append(answer)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.clients)))
    return answers, time.perf_counter() - started


def long_prompt(load: Load) -> str:
    """The prompt that arrives among the streams of `load`."""
    return prompts(Load(1, 1, 2048, 1, seed=load.seed + "intruder"))[0]


async def run_arrival(port: int, load: Load, extra: dict[str, object]) -> tuple[list[Answer], Answer]:
    """The answers of streams that all run at once, and that of a long prompt that arrives beside them."""
    streams = [asyncio.create_task(ask(port, text, load.output_tokens, extra)) for text in prompts(load)]
    await asyncio.sleep(ARRIVAL_AFTER_S)
    long = await ask(port, long_prompt(load), 1, extra)
    return list(await asyncio.gather(*streams)), long


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def refuse_failed(answers: Sequence[Answer]) -> None:
    failed = [a.error for a in answers if a.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")


def figures(load: Load, answers: list[Answer], wall_s: float) -> dict[str, float]:
    """Named figures of one run: rates in tokens/s, times in ms."""
    refuse_failed(answers)
    firsts = [a.first_token_s * 1e3 for a in answers]
    gaps = [gap * 1e3 for a in answers for gap in a.gaps_s]
    out = {
        "output_tok_s": sum(len(a.arrivals) for a in answers) / wall_s,
        "ttft_ms_p50": percentile(firsts, 50),
        "ttft_ms_p95": percentile(firsts, 95),
        "ttft_ms_later": percentile(firsts[1:] or firsts, 50),
        "prefill_tok_s": load.prompt_tokens / percentile(firsts, 50) * 1e3,
    }
    if load.shared_prefix_tokens:
        out["ttft_ms_cold"] = firsts[0]
    if gaps:
        out |= {
            "gap_ms_p50": percentile(gaps, 50),
            "gap_ms_p95": percentile(gaps, 95),
            "decode_tok_s": 1e3 / (sum(gaps) / len(gaps)) if load.clients == 1 else 0.0,
        }
    return out


def arrival_figures(answers: list[Answer], long: Answer) -> dict[str, float]:
    """Gaps of running streams before, and while, a long prompt was computed beside them."""
    refuse_failed([*answers, long])
    quiet, during = [], []
    for answer in answers:
        for before, after in zip(answer.arrivals, answer.arrivals[1:], strict=False):
            if after <= long.sent:
                quiet.append((after - before) * 1e3)
            elif before < long.arrivals[0]:
                during.append((after - before) * 1e3)
    if not quiet or not during:
        return {}
    return {
        "gap_ms_p95_quiet": percentile(quiet, 95),
        "gap_ms_p95_arrival": percentile(during, 95),
        "arrival_ttft_ms": long.first_token_s * 1e3,
    }
