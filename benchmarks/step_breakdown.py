#!/usr/bin/env python3
"""Where the time of one stream's tokens goes: runs one stream against a real server and prints a table per token.

  python benchmarks/step_breakdown.py                        the embedded model, 512 tokens after a prompt of 64
  python benchmarks/step_breakdown.py --tokens 512 --clients 8 --json

`native compute` is measured around the kernels, the parts of the house come from /metrics (`textmill_step_seconds`);
what the event loops' threads ran beyond that (gRPC, turns of the loop, the kernel) is counted besides. Everything
but compute can be hidden behind the next step's compute: what is not is the time between tokens minus compute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from load import Answer, Load, ask, figures, prompts, run
from servers import SERVERS, Running, wait_until_quiet

PROMPT_SECONDS = 0.7  # after which prompts of 64 tokens are surely done
PARTS = (
    ("runner", "runner: tables, arrays in and out"),
    ("schedule", "engine: planning the step"),
    ("update", "engine: digesting it, handing over"),
    ("send", "engine: message, gRPC write"),
    ("engine loop", "engine: event loop and gRPC besides"),
    ("receive", "router: reading the message"),
    ("text", "router: tokens to text"),
    ("http", "router: events, HTTP write"),
    ("router loop", "router: event loop, gRPC, HTTP besides"),
)


def part_seconds(port: int) -> dict[str, float]:
    """`textmill_step_seconds` by part, and the number of steps."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = {
        line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("textmill_step_seconds{")
    }
    found["steps"] = next(float(line.split()[1]) for line in lines if line.startswith("textmill_steps "))
    return found


def ran_seconds(path: Path) -> float:
    """What a thread has run so far, by the kernel's own account."""
    return int((path / "schedstat").read_text().split()[0]) / 1e9


def loops(launcher: int) -> dict[str, float]:
    """CPU seconds of the engine's event loop (its main thread) and of all threads of the routers."""
    seconds = {"engine loop": 0.0, "router loop": 0.0}
    for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        tasks = Path(f"/proc/{child}/task")
        name = (tasks / str(child) / "comm").read_text().strip()
        if name == "textmill-engine":
            seconds["engine loop"] += ran_seconds(tasks / str(child))
        elif name == "textmill-router":
            seconds["router loop"] += sum(map(ran_seconds, tasks.iterdir()))
    return seconds


def account(before: dict[str, float], after: dict[str, float], tokens: int) -> dict[str, float]:
    """Milliseconds a token of every part."""
    spent = {name: 1e3 * (after[name] - before.get(name, 0.0)) / tokens for name in after}
    spent["engine loop"] = max(0.0, spent["engine loop"] - spent["send"])
    spent["router loop"] = max(0.0, spent["router loop"] - spent["receive"] - spent["text"] - spent["http"])
    return spent


def table(total: float, spent: dict[str, float]) -> str:
    """Milliseconds and shares of the time between two tokens."""
    other = sum(spent[part] for part, _ in PARTS)
    rows = [("time between two tokens, at the client", total), ("native compute", spent["compute"])]
    rows += [(f"  {title}", spent[part]) for part, title in PARTS]
    visible = max(0.0, total - spent["compute"])
    rows += [("everything but compute", other), ("  of it not hidden behind compute", visible)]
    rows += [("  of it hidden", max(0.0, other - visible))]
    return "\n".join(f"{title:42} {ms:8.3f} ms {100 * ms / total:6.1f} %" for title, ms in rows)


async def decode_only(port: int, load: Load, extra: dict[str, object], launcher: int) -> tuple[float, dict[str, float]]:
    """Streams start, their prompts are left behind, then everything is counted to their end."""
    streams = [asyncio.create_task(ask(port, text, load.output_tokens, extra)) for text in prompts(load)]
    await asyncio.sleep(PROMPT_SECONDS)
    before = await asyncio.to_thread(counted, port, launcher)
    begun = time.perf_counter()
    answers: list[Answer] = await asyncio.gather(*streams)
    after = counted(port, launcher)
    figures(load, answers, 1.0)  # raises if a request failed
    pairs = [pair for one in answers for pair in pairwise(one.arrivals) if pair[0] > begun]
    total = 1e3 * sum(late - early for early, late in pairs) / len(pairs)
    return total, account(before, after, int(after["steps"] - before["steps"]))


def counted(port: int, launcher: int) -> dict[str, float]:
    return part_seconds(port) | loops(launcher)


def measure(args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """The mean time between tokens of a stream, and what the parts spent on a token of it, both in ms."""
    server = SERVERS["textmill"]
    with Running(server, args.model, args.port, args.threads, args.log) as running:
        load = Load(args.clients, args.clients, 64, args.tokens, seed="breakdown")
        asyncio.run(run(args.port, Load(1, 1, 64, 16, seed="warm"), server.extra))
        wait_until_quiet(20)
        return asyncio.run(decode_only(args.port, load, server.extra, running.process.pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the embedded model)")
    parser.add_argument("--tokens", type=int, default=512, help="output tokens of a stream")
    parser.add_argument("--clients", type=int, default=1, help="streams at once; the table is then per step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=8393)
    parser.add_argument("--log", type=Path, default=Path("results/step_breakdown.log"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        from textmill.weights.source import resolve

        args.model = resolve(None).path
    total, spent = measure(args)
    print(json.dumps({"inter_token_ms": total, "parts_ms": spent}) if args.json else table(total, spent))


if __name__ == "__main__":
    main()
