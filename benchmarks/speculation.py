#!/usr/bin/env python3
"""What `--speculate` wins where the answer repeats given text, and what it costs where nothing can be guessed.

  python benchmarks/speculation.py                        6 guesses, 5 rounds, one client
  python benchmarks/speculation.py --speculate 4 --rounds 3 --clients 4

Two servers run side by side, one of them speculating, and get the same requests in turn, so that both see the same
machine. Every pair of answers must be equal, bit for bit: tokens and log-probabilities. Rates count the tokens after
the first one; figures are medians over rounds with (least-most), and "won" is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from servers import OURS, Running, Server, wait_until_quiet

PASSAGE = Path(__file__).parents[1] / "tests" / "data" / "passage.txt"
CODE = """class Account:
    def __init__(self, owner, balance):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        return self.balance
"""
NAMES = ("Ada Birk", "Bo Calder", "Cy Dunn", "Di Egan", "Ed Farr", "Flo Gant", "Gus Hale", "Hal Ives", "Ida Jude")
LINES = "\n".join(f"{place}. {name}, born {1900 + 7 * place}" for place, name in enumerate(NAMES, 1))
HOT: dict[str, object] = {"do_sample": True, "temperature": 1.0}


@dataclass(frozen=True, slots=True)
class Task:
    """A chat message and how its answer is sampled."""

    name: str
    message: str
    parameters: dict[str, object]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens as (id, log-probability), and the seconds from the first to the last."""

    tokens: tuple[tuple[int, float], ...]
    seconds: float


def tasks() -> list[Task]:
    first, second, third, *_ = PASSAGE.read_text(encoding="utf-8").split("\n\n")
    cool: dict[str, object] = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    repeat = "Repeat the following text word for word.\n\n"
    return [
        Task("repeat, greedy", repeat + second, {}),
        Task("repeat, sampled", repeat + third, cool),
        Task("rewrite a name", f"Rewrite the text with 'Marta' replaced by 'Anna'.\n\n{first}", {}),
        Task("edit code", f"Rename `balance` to `funds` in this code.\n\n{CODE}", {}),
        Task("copy a list", f"Copy this list and add one more line to it.\n\n{LINES}", {}),
        Task("story, greedy", "Write a story about a lighthouse keeper who learns to paint.", {}),
        Task("story, sampled", "Write a story about a dragon who plays chess with the sea.", HOT | {"seed": 3}),
        Task("names, sampled", "Invent forty unusual names for ships.", HOT | {"seed": 4}),
    ]


def ask(port: int, task: Task, tokens: int) -> Answer:
    """One stream of /generate_stream; ends early if the model ends."""
    prompt = f"<|im_start|>user\n{task.message}<|im_end|>\n<|im_start|>assistant\n"
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens, **task.parameters}}
    url = f"http://127.0.0.1:{port}/generate_stream"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    found: list[tuple[int, float]] = []
    arrivals: list[float] = []
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if "token" not in event:
                    raise RuntimeError(event.get("error", str(event)))
                found.append((event["token"]["id"], event["token"]["logprob"]))
                arrivals.append(time.perf_counter())
    return Answer(tuple(found), arrivals[-1] - arrivals[0])


def ask_all(port: int, task: Task, tokens: int, clients: int) -> tuple[list[Answer], float]:
    """The same request from all clients at once; tokens per second of all together."""
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: ask(port, task, tokens), range(clients)))
    return answers, sum(len(one.tokens) - 1 for one in answers) / max(one.seconds for one in answers)


def guesses(port: int) -> tuple[float, float]:
    """Accepted and rejected so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def named(outcome: str) -> float:
        found = [v for k, v in values.items() if k.startswith("textmill_speculated_tokens") and outcome in k]
        return found[0] if found else 0.0

    return named("accepted"), named("rejected")


def measure(task: Task, ports: tuple[int, int], args: argparse.Namespace) -> list[str]:
    """A row of the table. The server that goes first changes from round to round."""
    rates: tuple[list[float], list[float]] = ([], [])
    before = guesses(ports[1])
    for number in range(args.rounds + 1):
        answers: dict[int, list[Answer]] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            answers[which], rate = ask_all(ports[which], task, args.tokens, args.clients)
            if number:  # the first round warms the prefix cache
                rates[which].append(rate)
        if any(one.tokens != answers[0][0].tokens for one in answers[0] + answers[1]):
            raise RuntimeError(f"{task.name}: the answers differ")
    accepted, rejected = (after - was for after, was in zip(guesses(ports[1]), before, strict=True))
    made = (args.rounds + 1) * args.clients
    won = statistics.median(fast / plain for plain, fast in zip(*rates, strict=True))
    return [
        task.name,
        str(len(answers[0][0].tokens)),
        *(f"{statistics.median(rate):.0f} ({min(rate):.0f}-{max(rate):.0f})" for rate in rates),
        f"{won:.2f} ×",
        f"{accepted / made:.0f} / {rejected / made:.0f}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the embedded model)")
    parser.add_argument("--speculate", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=160, help="most tokens of an answer")
    parser.add_argument("--tasks", default="", help="only tasks whose name contains this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=8393, help="of the first server; the second gets the next one")
    args = parser.parse_args()
    if args.model is None:
        from textmill.weights.source import resolve

        args.model = resolve(None).path
    return args


def main() -> None:
    args = parse()
    plain, guessing = Server("plain", OURS), Server("guessing", f"{OURS} --speculate {args.speculate}")
    ports = (args.port, args.port + 1)
    head = ["task", "tokens", "plain, tokens/s", f"--speculate {args.speculate}", "won", "guesses right / wrong"]
    with (
        tempfile.TemporaryDirectory() as folder,
        Running(plain, args.model, ports[0], args.threads, Path(folder) / "plain.log"),
        Running(guessing, args.model, ports[1], args.threads, Path(folder) / "guessing.log"),
    ):
        wait_until_quiet(20)
        for row in (head, ["---"] * len(head)):
            print("| " + " | ".join(row) + " |")
        for task in tasks():
            if args.tasks in task.name:
                print("| " + " | ".join(measure(task, ports, args)) + " |", flush=True)


if __name__ == "__main__":
    main()
