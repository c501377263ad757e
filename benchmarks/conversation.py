#!/usr/bin/env python3
"""A conversation that grows turn by turn: does the time to the first token grow with the new tokens, or with the old?

  python benchmarks/conversation.py                     to 8,192 tokens, 200 new ones and 64 answered a turn
  python benchmarks/conversation.py --until 2048 --user-tokens 100 --json

Every turn sends the whole conversation again to /v1/chat/completions, as clients do. What the server did not find in
its prefix cache (`computed`) is the turn's text, the chat template around it, and at most a block that was not full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from load import WORDS
from servers import SERVERS, Running, wait_until_quiet

HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\nConnection: close\r\n\r\n"
)
TEMPLATE = 32  # tokens at most that a turn has beside question and answer
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn cost: tokens of the prompt, those of them not in the cache, of the answer; ms to the first one."""

    prompt: int
    computed: int
    answered: int
    ttft_ms: float


def counters(port: int) -> dict[str, float]:
    """Plain counters of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("textmill_p")}


async def ask(port: int, messages: list[Message], tokens: int) -> tuple[str, int, float]:
    """The answer, its number of events with text, and the seconds to the first."""
    body = {"model": "tgi", "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
    payload = json.dumps(body).encode()
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD.format(length=len(payload)).encode() + payload)
    pieces: list[str] = []
    first = 0.0
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode(errors="replace")[:300])
    while line := await reader.readline():
        if not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        event = json.loads(line[5:])
        if not event.get("choices"):
            raise RuntimeError(json.dumps(event)[:300])
        first = first or time.perf_counter() - sent
        pieces.append(event["choices"][0]["delta"].get("content") or "")
    writer.close()
    return "".join(pieces), len(pieces), first


def question(dice: random.Random, words: int) -> Message:
    """Something to talk about at length, and `words` random words, one token each."""
    topic = dice.choice(WORDS)
    text = " ".join(dice.choice(WORDS) for _ in range(words))
    return {"role": "user", "content": f"Tell a long story about a {topic}, in which these come up: {text}"}


def converse(port: int, until: int, user_tokens: int, answer_tokens: int) -> list[Turn]:
    """Turns until the next would pass `until` tokens; then the last again behind another beginning: all computed."""
    dice = random.Random("conversation")
    messages: list[Message] = []
    turns: list[Turn] = []
    while not turns or turns[-1].prompt + 2 * answer_tokens + user_tokens + TEMPLATE < until:
        messages.append(question(dice, user_tokens - 15))
        answer, turn = take_turn(port, messages, answer_tokens)
        messages.append({"role": "assistant", "content": answer})
        turns.append(turn)
    messages[0]["content"] = "Now " + messages[0]["content"]
    return [*turns, take_turn(port, messages[:-1], answer_tokens)[1]]


def take_turn(port: int, messages: list[Message], answer_tokens: int) -> tuple[str, Turn]:
    before = counters(port)
    answer, count, first = asyncio.run(ask(port, messages, answer_tokens))
    after = counters(port)
    prompt, hits = (
        int(after[name] - before[name]) for name in ("textmill_prompt_tokens", "textmill_prefix_cache_hit_tokens")
    )
    return answer, Turn(prompt, prompt - hits, count, first * 1e3)


def table(turns: list[Turn]) -> str:
    """A line a turn, then what a computed token cost early and late, and what the cache saved at the end."""
    *turns, cold = turns
    lines = [f"{'turn':>4} {'prompt':>7} {'computed':>9} {'answer':>7} {'TTFT ms':>8} {'ms/computed token':>18}"]
    for number, turn in enumerate(turns, 1):
        each = turn.ttft_ms / turn.computed
        lines.append(
            f"{number:>4} {turn.prompt:>7,} {turn.computed:>9,} {turn.answered:>7} {turn.ttft_ms:>8.0f} {each:>18.2f}"
        )
    quarter = max(1, len(turns) // 4)
    early, late = (mean_ms(some) for some in (turns[1 : 1 + quarter], turns[-quarter:]))
    old = turns[-1].prompt / turns[min(1, len(turns) - 1)].prompt
    lines.append(
        f"a computed token took {early:.2f} ms early, {late:.2f} ms late: x {late / early:.2f} at a history x {old:.1f}"
    )
    lines.append(
        f"the last prompt with nothing cached ({cold.computed:,} tokens): {cold.ttft_ms:.0f} ms, "
        f"x {cold.ttft_ms / turns[-1].ttft_ms:.1f} of its turn"
    )
    return "\n".join(lines)


def mean_ms(turns: list[Turn]) -> float:
    return sum(turn.ttft_ms for turn in turns) / max(1, sum(turn.computed for turn in turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the embedded model)")
    parser.add_argument("--until", type=int, default=8192, help="tokens at which the conversation ends")
    parser.add_argument("--user-tokens", type=int, default=200)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=8394)
    parser.add_argument("--log", type=Path, default=Path("results/conversation.log"))
    parser.add_argument("--json", action="store_true", help="print the turns as one JSON list")
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        from textmill.weights.source import resolve

        args.model = resolve(None).path
    with Running(SERVERS["textmill"], args.model, args.port, args.threads, args.log):
        wait_until_quiet(20)
        turns = converse(args.port, args.until, args.user_tokens, args.answer_tokens)
    print(json.dumps([asdict(turn) for turn in turns]) if args.json else table(turns))


if __name__ == "__main__":
    main()
