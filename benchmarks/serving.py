#!/usr/bin/env python3
"""Serves one GGUF file with textmill, llama.cpp's llama-server and OpenVINO GenAI in turn; compares what clients feel.

  python benchmarks/serving.py                          all steps, 5 alternating rounds, writes results/serving.jsonl
  python benchmarks/serving.py --steps load-32 --rounds 3 --servers textmill
  python benchmarks/serving.py --report                 only the table from the results there are

Every round starts each of them anew (start-up is measured each time), waits for a quiet machine, warms it with one
request and runs the steps. Figures are medians over rounds with (least-most); a ratio above 1 is in textmill's favour.
openvino-genai has no server: it runs in its own process and pays for no HTTP. Peers are installed once, on demand,
into $TEXTMILL_PEERS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from load import Load
from servers import wait_until_quiet
from subjects import NAMES, install, start

OURS = "textmill"
STEPS = {
    "decode": Load(1, 3, 64, 128),
    "prefill-512": Load(1, 3, 512, 1),
    "prefill-2048": Load(1, 2, 2048, 1),
    "load-1": Load(1, 4, 128, 64),
    "load-4": Load(4, 24, 128, 64),
    "load-8": Load(8, 40, 128, 64),
    "load-16": Load(16, 48, 128, 64),
    "load-32": Load(32, 64, 128, 64),
    "short-1": Load(1, 3, 16, 128),
    "short-32": Load(32, 32, 16, 128),
    "prefix": Load(1, 6, 16, 8, shared_prefix_tokens=2000),
    "arrival": Load(8, 8, 64, 256),
}
WARM = Load(1, 1, 2, 8, seed="warm")
# Rows of the report: (title, step, figure, more is better).
ROWS = [
    ("decode, one stream, tokens/s", "decode", "decode_tok_s", True),
    ("prefill of 512, tokens/s", "prefill-512", "prefill_tok_s", True),
    ("prefill of 2,048, tokens/s", "prefill-2048", "prefill_tok_s", True),
    *[(f"output tokens/s, {n} clients (128 in, 64 out)", f"load-{n}", "output_tok_s", True) for n in (1, 4, 8, 16, 32)],
    *[(f"output tokens/s, {n} clients (16 in, 128 out)", f"short-{n}", "output_tok_s", True) for n in (1, 32)],
    ("TTFT p50, 8 clients, ms", "load-8", "ttft_ms_p50", False),
    ("TTFT p95, 8 clients, ms", "load-8", "ttft_ms_p95", False),
    ("inter-token p50, 8 clients, ms", "load-8", "gap_ms_p50", False),
    ("inter-token p95, 8 clients, ms", "load-8", "gap_ms_p95", False),
    ("TTFT, 2,000-token prefix, cold, ms", "prefix", "ttft_ms_cold", False),
    ("TTFT, 2,000-token prefix, warm, ms", "prefix", "ttft_ms_later", False),
    ("inter-token p95, 8 streams, quiet, ms", "arrival", "gap_ms_p95_quiet", False),
    ("inter-token p95 while a 2,048-token prompt arrives, ms", "arrival", "gap_ms_p95_arrival", False),
    ("peak memory, MiB", "process", "peak_memory_mib", False),
    ("start to ready, s", "process", "startup_s", False),
]


def round_of(name: str, args: argparse.Namespace, number: int) -> None:
    wait_until_quiet()
    with start(name, args.model, args.port, args.threads, args.out.with_suffix(f".{name}.log")) as subject:
        subject.measure(WARM)
        for step in args.steps:
            wait_until_quiet(20)
            load = replace(STEPS[step], seed=f"{step}/{number}")
            record(args.out, name, step, number, subject.measure(load, arrival=step == "arrival"))
        process = {"startup_s": subject.startup_s, "peak_memory_mib": subject.peak_memory_mib()}
        record(args.out, name, "process", number, process)


def record(out: Path, server: str, step: str, number: int, found: dict[str, float]) -> None:
    rounded = {key: round(value, 3) for key, value in found.items()}
    line = {"server": server, "step": step, "round": number} | rounded
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def report(out: Path) -> str:
    """A Markdown table of medians, spread and ratios to textmill."""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    names = [name for name in NAMES if any(line["server"] == name for line in lines)]
    peers = [name for name in names if name != OURS]
    head = ["figure", *names, *(f"{OURS} : {peer}" for peer in peers), f"{OURS} : best peer"]
    table = [head, ["---"] * len(head)]
    for title, step, figure, more in ROWS:
        values = {
            name: [line[figure] for line in lines if (line["server"], line["step"]) == (name, step) and figure in line]
            for name in names
        }
        if any(values.values()):
            table.append([title, *(cell(values[name]) for name in names), *ratios(values, peers, more)])
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def cell(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):,.4g} ({min(values):,.4g}–{max(values):,.4g})"


def ratios(values: dict[str, list[float]], peers: list[str], more: bool) -> list[str]:
    """Ours to each peer, then to the best of them, which is named."""
    medians = {name: statistics.median(found) for name, found in values.items() if found}
    if OURS not in medians:
        return ["–"] * (len(peers) + 1)

    def ratio(peer: str) -> float:
        value = medians[OURS] / medians[peer]
        return value if more else 1 / value

    measured = {peer: ratio(peer) for peer in peers if peer in medians}
    cells = [f"{measured[peer]:.2f} ×" if peer in measured else "–" for peer in peers]
    best = min(measured, key=lambda peer: measured[peer], default=None)
    return [*cells, f"{measured[best]:.2f} × ({best})" if best else "–"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the embedded model)")
    parser.add_argument("--servers", default=",".join(NAMES), help="of " + ", ".join(NAMES))
    parser.add_argument("--steps", default=",".join(STEPS), help="of " + ", ".join(STEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=8391)
    parser.add_argument("--out", type=Path, default=Path("results/serving.jsonl"))
    parser.add_argument("--report", action="store_true", help="only print the table of the results there are")
    args = parser.parse_args()
    args.servers, args.steps = args.servers.split(","), args.steps.split(",")
    return args


def main() -> None:
    args = parse()
    if not args.report:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.model is None:
            from textmill.weights.source import resolve

            args.model = resolve(None).path
        install(args.servers, args.threads)
        for number in range(args.rounds):
            for name in args.servers:
                round_of(name, args, number)
    print(report(args.out))


if __name__ == "__main__":
    main()
