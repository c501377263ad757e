"""What every family must pass: the logits and the greedy tokens of its oracle, however its tokens are computed.

A `Case` is a tiny checkpoint and an oracle for it; the checks run it through both executors and through the whole
engine. What they measure goes to the file that TEXTMILL_PARITY names, of which `scripts/models_page.py` makes
docs/models.md; other tests add their columns: `record(case, ranks=2)`, `record(case, gguf=True)`.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import Make
from textmill.core import Admission, Emission, Finish, Request, RunnerLimits, Sampling, SlotWork, Step
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings
from textmill.kernels import native
from textmill.kernels.native import Program
from textmill.models.registry import FAMILIES, build_model
from textmill.runner.native_executor import NativeExecutor
from textmill.runner.runner import Executor, LocalRunner
from textmill.runner.slots import apply
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import Checkpoint, open_checkpoint
from textmill.weights.view import View

BLOCK = 16
SLOTS = 8
TOTAL = 192
STEPS = 32
TOLERANCE = 1e-4
ROOMY = SLOTS * TOTAL // BLOCK

# (prompt, continuation) -> logits [len(continuation) + 1, vocabulary]: after the prompt and after each further token.
Oracle = Callable[[Sequence[int], Sequence[int]], torch.Tensor]


def load(folder: Path, attention: str = "sdpa", model_class: Any = AutoModelForCausalLM) -> Any:
    """Transformers' own model of a checkpoint."""
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def logits_from(model: Any) -> Oracle:
    """The oracle that a transformers model is: prompt and continuation in one pass, without a cache."""

    def logits(prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            found = model(torch.tensor([[*prompt, *continuation]]), use_cache=False).logits
        return found[0, len(prompt) - 1 :].float()

    return logits


def transformers_oracle(attention: str = "sdpa", model_class: Any = AutoModelForCausalLM) -> Callable[[Path], Oracle]:
    """What loads that; "eager" where sdpa leaves something out (soft caps)."""
    return lambda folder: logits_from(load(folder, attention, model_class))


TRANSFORMERS = transformers_oracle()


@dataclass(frozen=True)
class Case:
    """One checkpoint layout or option of a family.

    `make` writes the checkpoint folder, `oracle` loads what it must equal. The other fields hold reasons: why it
    cannot be recorded (then recording must raise Unrecordable), why the prefix cache is off (then nothing may come
    from it), why it does not run on several ranks.
    """

    family: str
    variant: str
    make: Make
    oracle: Callable[[Path], Oracle] = TRANSFORMERS
    not_native: str = ""
    no_prefix_cache: str = ""
    no_ranks: str = ""

    @property
    def id(self) -> str:
        return f"{self.family}-{self.variant}".replace(" ", "_")


class Prepared:
    """A case's checkpoint on disk with its oracle; what the oracle has confirmed once it need not compute again."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        case.make(folder)
        self.oracle = case.oracle(folder)
        c = self.checkpoint().config
        self.vocabulary = c.vocab_size
        names = ("not_native", "no_prefix_cache", "no_ranks")
        reasons = {name: reason for name in names if (reason := getattr(case, name))}
        record(case, file=f"{FAMILIES[c.model_type]}.py", **reasons)
        self._confirmed: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self._prompt_logits: dict[tuple[int, ...], torch.Tensor] = {}

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    def prompt(self, length: int, seed: int) -> list[int]:
        """Random tokens without the special ones."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.vocabulary, (length,), generator=generator).tolist()

    def prompt_logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """The oracle's logits after every token of a prompt."""
        if tuple(prompt) not in self._prompt_logits:
            self._prompt_logits[tuple(prompt)] = self.oracle(prompt[:1], prompt[1:])
        return self._prompt_logits[tuple(prompt)]

    def assert_greedy(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Every token is the oracle's first choice after all before it, so these are the oracle's greedy tokens."""
        key = (tuple(prompt), tuple(tokens))
        if key not in self._confirmed:
            assert self.oracle(prompt, tokens[:-1]).argmax(-1).tolist() == list(tokens)
            self._confirmed.add(key)


# Executors


def native_mark() -> pytest.MarkDecorator:
    return pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")


EXECUTORS = ["torch", pytest.param("native", marks=native_mark())]


def executor_for(prepared: Prepared, kind: str, blocks: int = ROOMY) -> Executor:
    """The case's model on one of the executors; every tensor of the checkpoint has been read."""
    checkpoint = prepared.checkpoint()
    model = build_model(checkpoint.config, View(checkpoint))
    if kind == "torch":
        executor: Executor = TorchExecutor(model, SLOTS, TOTAL, BLOCK, blocks)
        admit(executor, 0, prepared.prompt(2, 0))
        executor.run([SlotWork(0, 0, 2, True)])  # matrices are read when first used
    else:
        sizes = {"max_rows": 512, "max_slots": SLOTS, "max_total_tokens": TOTAL, "block_size": BLOCK}
        program = Program(**sizes, vocab_size=prepared.vocabulary, kv_dtype="float32")
        executor = NativeExecutor(model, program, "float32")
        program.allocate(blocks)
    assert checkpoint.unread() == []
    return executor


def admit(executor: Executor, slot: int, prompt: Sequence[int], *, all_logits: bool = False) -> None:
    first = slot * (TOTAL // BLOCK)
    blocks = tuple(range(first, first + TOTAL // BLOCK))
    source = source_of(prompt) if executor.memory.encodes else ()
    admission = Admission(slot, tuple(prompt), Sampling(), prompt_logprobs=all_logits, encoder_tokens=source)
    apply(Step(0, (), (admission,), (), ((slot, 0, blocks),)), executor.tables)


def source_of(prompt: Sequence[int]) -> tuple[int, ...]:
    """What the encoder of a model that has one reads: 1 to 60 tokens, told by the prompt's first."""
    return tuple(3 + (prompt[0] + place) ** 2 % 97 for place in range(1 + prompt[0] * 7 % 60))


def logits_of(executor: Executor, work: Sequence[SlotWork]) -> torch.Tensor:
    """The logits of the step that just ran (torch) or that runs for it (native)."""
    if isinstance(executor, TorchExecutor):
        return executor.logits
    assert isinstance(executor, NativeExecutor)
    rows = np.array([(w.slot, w.start, w.count, w.samples) for w in work], dtype=np.int32)
    return torch.from_numpy(executor.program.logits(rows))


def served(
    executor: Executor, vocabulary: int, prompts: Sequence[Sequence[int]], *, blocks: int = ROOMY, chunk: int = 512
) -> tuple[list[list[int]], dict[str, float]]:
    """Greedy tokens of all prompts through the whole engine, prompts in chunks, and what the engine counted.

    The last prompt comes once more when all others have ended: from the prefix cache, if there is one.
    """
    limits = executor.memory.limited(RunnerLimits(BLOCK, blocks, SLOTS, 512, TOTAL, vocabulary))
    engine = Engine(LocalRunner(executor, limits), EngineSettings(max_batch_prefill_tokens=chunk))
    engine.start()
    tokens: list[list[int]] = [[] for _ in (*prompts, 0)]
    failed: list[str] = []
    done = threading.Semaphore(0)

    def sink(_step: int, emissions: Sequence[Emission]) -> None:
        for one in emissions:
            tokens[one.request_id] += [token.id for token in one.tokens]
            if one.finish is not Finish.NONE:
                failed.extend([one.error] if one.finish is Finish.FAILED else [])
                done.release()

    def request(number: int, prompt: Sequence[int]) -> Request:
        return Request(
            number, tuple(prompt), STEPS, encoder_tokens=source_of(prompt) if executor.memory.encodes else ()
        )

    for number, prompt in enumerate(prompts):
        engine.submit(request(number, prompt), sink)
    assert all(done.acquire(timeout=100) for _ in prompts)
    engine.submit(request(len(prompts), prompts[-1]), sink)
    assert done.acquire(timeout=100)
    stats = dict(engine.stats())
    engine.stop()
    assert not failed, failed
    return tokens, stats


# Checks


def check_not_recordable(prepared: Prepared) -> None:
    """What is said not to run natively really does not, and says so in the way that the runner understands."""
    with pytest.raises(native.Unrecordable):
        executor_for(prepared, "native")
    record(prepared.case, executor="torch")


def check_logits(prepared: Prepared, kind: str) -> None:
    """Logits of a prompt in three chunks, and the log-probabilities of its tokens."""
    prompt = prepared.prompt(100, 1)
    expected = prepared.prompt_logits(prompt)
    assert float(expected.std()) > 0.5, "logits without spread prove nothing"
    executor = executor_for(prepared, kind)
    # Asking a program for logits is a step more, and a state moves on with every step.
    asked = executor_for(prepared, kind) if executor.memory.forward_only and kind == "native" else executor
    for one in (executor, asked):
        admit(one, 0, prompt, all_logits=True)
    largest = 0.0
    for start, count in ((0, 37), (37, 50), (87, 13)):
        work = [SlotWork(0, start, count, False)]
        sampled = executor.run(work)[0]
        found = logits_of(asked, work)
        largest = max(largest, float((found - expected[start : start + count]).abs().max()))
        torch.testing.assert_close(found, expected[start : start + count], atol=TOLERANCE, rtol=TOLERANCE)
        following = torch.tensor(prompt[start + 1 : start + count + 1])
        raw = expected[start : start + len(following)].log_softmax(-1).gather(1, following[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sampled.prompt_logprobs), raw, atol=TOLERANCE, rtol=TOLERANCE)
    record(prepared.case, executor=kind, error=largest)


def check_alone(prepared: Prepared, kind: str) -> None:
    """A sequence on its own, its prompt in one piece; then again from the prefix cache."""
    prompt = prepared.prompt(60, 2)
    tokens, stats = served(executor_for(prepared, kind), prepared.vocabulary, [prompt])
    assert len(tokens[0]) == STEPS
    assert len(set(tokens[0])) > 4, "a model that repeats itself proves nothing"
    prepared.assert_greedy(prompt, tokens[0])
    assert tokens[1] == tokens[0]
    check_cache(prepared, stats)
    record(prepared.case, executor=kind, alone=True)


def check_together(prepared: Prepared, kind: str) -> None:
    """Eight of mixed lengths at once, prompts in chunks of at most 24 tokens, with room for all."""
    prompts = [prepared.prompt(3 + 9 * number, 10 + number) for number in range(8)]
    tokens, stats = served(executor_for(prepared, kind), prepared.vocabulary, prompts, chunk=24)
    for prompt, found in zip((*prompts, prompts[-1]), tokens, strict=True):
        prepared.assert_greedy(prompt, found)
    assert stats["preemptions"] == 0
    record(prepared.case, executor=kind, together=True)


def check_preempted(prepared: Prepared, kind: str) -> None:
    """Eight with common beginnings and half the blocks they need: sequences are put aside and computed again."""
    shared = prepared.prompt(40, 99)
    prompts = [shared[: 16 * (number % 3)] + prepared.prompt(6 + 5 * number, number) for number in range(8)]
    blocks = 18
    tokens, stats = served(executor_for(prepared, kind, blocks), prepared.vocabulary, prompts, blocks=blocks, chunk=24)
    for prompt, found in zip((*prompts, prompts[-1]), tokens, strict=True):
        prepared.assert_greedy(prompt, found)
    assert stats["preemptions"] > 0
    check_cache(prepared, stats)
    record(prepared.case, executor=kind, preempted=True)


def check_cache(prepared: Prepared, stats: dict[str, float]) -> None:
    assert (stats["prefix_hit_tokens"] > 0) == (not prepared.case.no_prefix_cache)


# Results


def record(case: Case, **found: Any) -> None:
    """Adds what a test measured to the file of results, if one is wanted; one JSON object a line."""
    path = os.environ.get("TEXTMILL_PARITY")
    if not path:
        return
    line = json.dumps({"family": case.family, "variant": case.variant} | found)
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ranks are processes of their own
        file.write(line + "\n")
