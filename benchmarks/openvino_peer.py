#!/usr/bin/env python3
"""OpenVINO GenAI in a process of its own: told its steps as JSON lines, answers each with a line of figures.

  echo '{"load": {"clients": 4, "requests": 8, "prompt_tokens": 128, "output_tokens": 64}}' |
    PEERS/openvino-genai/bin/python benchmarks/openvino_peer.py --model model.gguf

The first line out, `{}`, says that the model is loaded. It has no server, so nothing here pays for HTTP, and tokens are
not turned into text: its figures are at best those of a server around it. A client that is answered asks again at
the next step of the pipeline. Needs the package openvino-genai; serving.py makes its virtual environment and runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import openvino_genai
from load import ARRIVAL_AFTER_S, Answer, Load, arrival_figures, figures, long_prompt, prompts

RUNNING = openvino_genai.GenerationStatus.RUNNING


class Engine:
    """A continuously batching pipeline, its requests, and what their clients see."""

    def __init__(self, model: Path, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GiB
        scheduler.max_num_batched_tokens = 512
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._next_id = 0
        self._live: list[tuple[Answer, Any]] = []

    def add(self, prompt: str, output_tokens: int, sent: float | None = None) -> Answer:
        """Hands a prompt over; `sent` is when its client asked, if that was before now."""
        answer = Answer(time.perf_counter() if sent is None else sent)
        config = openvino_genai.GenerationConfig(max_new_tokens=output_tokens, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        tokens = self._tokenizer.encode(prompt, add_special_tokens=False).input_ids
        self._live.append((answer, self._pipeline.add_request(self._next_id, tokens, config)))
        self._next_id += 1
        return answer

    def step(self) -> int:
        """One step of the pipeline; how many requests are still running."""
        self._pipeline.step()
        now = time.perf_counter()
        still = []
        for answer, handle in self._live:
            ended = handle.get_status() != RUNNING
            while handle.can_read():
                for output in handle.read().values():
                    answer.arrivals += [now] * len(output.generated_ids)
            if not ended:
                still.append((answer, handle))
            elif not answer.arrivals:
                answer.error = f"no token came out: {handle.get_status()}"
        self._live = still
        return len(still)


def run(engine: Engine, load: Load) -> dict[str, float]:
    waiting = deque(prompts(load))
    answers: list[Answer] = []
    running = 0
    started = time.perf_counter()
    while waiting or running:
        while waiting and running < load.clients:
            answers.append(engine.add(waiting.popleft(), load.output_tokens))
            running += 1
        running = engine.step()
    return figures(load, answers, time.perf_counter() - started)


def run_arrival(engine: Engine, load: Load) -> dict[str, float]:
    due = time.perf_counter() + ARRIVAL_AFTER_S
    answers = [engine.add(prompt, load.output_tokens) for prompt in prompts(load)]
    while time.perf_counter() < due and engine.step():
        pass
    long = engine.add(long_prompt(load), 1, sent=due)
    while engine.step():
        pass
    return arrival_figures(answers, long)


def own_output() -> TextIO:
    """Standard output for our lines alone: what the libraries print goes to standard error."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    out = own_output()
    engine = Engine(args.model, args.threads)
    print("{}", file=out)
    for line in sys.stdin:
        request = json.loads(line)
        load = Load(**request["load"])
        found = run_arrival(engine, load) if request.get("arrival") else run(engine, load)
        print(json.dumps(found), file=out)


if __name__ == "__main__":
    main()
