"""Llama against transformers on tiny random float32 checkpoints: logits within 1e-4, equal greedy tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from textmill.core import Admission, Emission, Finish, Request, RunnerLimits, Sampling, SlotWork, Step
from textmill.engine.engine import Engine
from textmill.engine.scheduler import EngineSettings
from textmill.kernels.dispatch import native_available
from textmill.kernels.native import Program
from textmill.models.registry import build_model
from textmill.runner.native_executor import NativeExecutor
from textmill.runner.runner import Executor, LocalRunner
from textmill.runner.slots import apply
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

BLOCK = 16
SLOTS = 16
TOTAL = 256
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head_dim": {"head_dim": 32},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}
EXECUTORS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native_available(), reason="not built"))]


def executor_for(folder: Path, kind: str, blocks: int = SLOTS * TOTAL // BLOCK) -> Executor:
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint.config, View(checkpoint))
    if kind == "torch":
        return TorchExecutor(model, SLOTS, TOTAL, BLOCK, blocks)
    program = Program(
        max_rows=512,
        max_slots=SLOTS,
        max_total_tokens=TOTAL,
        block_size=BLOCK,
        vocab_size=checkpoint.config.vocab_size,
        kv_dtype="float32",
    )
    executor = NativeExecutor(model, program, "float32")
    program.allocate(blocks)
    assert checkpoint.unread() == []
    return executor


def logits_of(executor: Executor, work: Sequence[SlotWork]) -> torch.Tensor:
    if isinstance(executor, TorchExecutor):
        return executor.logits
    assert isinstance(executor, NativeExecutor)
    rows = np.array([(w.slot, w.start, w.count, w.samples) for w in work], dtype=np.int32)
    return torch.from_numpy(executor.program.logits(rows))


def admit(executor: Executor, slot: int, prompt: Sequence[int], *, all_logits: bool = False) -> None:
    first = slot * (TOTAL // BLOCK)
    blocks = tuple(range(first, first + TOTAL // BLOCK))
    admission = Admission(slot, tuple(prompt), Sampling(), prompt_logprobs=all_logits)
    apply(Step(0, (), (admission,), (), ((slot, 0, blocks),)), executor.tables)


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(executor: Executor, prompts: Sequence[Sequence[int]], steps: int, chunk: int = 512) -> list[list[int]]:
    """Tokens of all prompts decoded together, each prefilled in chunks."""
    out: list[list[int]] = [[] for _ in prompts]
    for slot, prompt in enumerate(prompts):
        admit(executor, slot, prompt)
        for start in range(0, len(prompt), chunk):
            count = min(chunk, len(prompt) - start)
            sampled = executor.run([SlotWork(slot, start, count, start + count == len(prompt))])[0]
        assert sampled.token is not None
        out[slot].append(sampled.token.id)
    for step in range(1, steps):
        work = [SlotWork(slot, len(prompt) + step - 1, 1, True) for slot, prompt in enumerate(prompts)]
        for slot, sampled in enumerate(executor.run(work)):
            assert sampled.token is not None
            out[slot].append(sampled.token.id)
    return out


def oracle(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def oracle_tokens(model: Any, prompt: Sequence[int], steps: int) -> list[int]:
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tiny_llama: Callable[..., Path], variant: str, kind: str) -> None:
    folder = tiny_llama(**VARIANTS[variant])
    prompt = prompt_of(100, 1)
    with torch.inference_mode():
        expected = oracle(folder)(torch.tensor([prompt])).logits[0]
    executor = executor_for(folder, kind)
    admit(executor, 0, prompt, all_logits=True)
    for start, count in ((0, 37), (37, 50), (87, 13)):
        work = [SlotWork(0, start, count, False)]
        sampled = executor.run(work)[0]
        torch.testing.assert_close(logits_of(executor, work), expected[start : start + count], atol=1e-4, rtol=1e-4)
        following = torch.tensor(prompt[start + 1 : start + count + 1])
        raw = expected[start : start + len(following)].log_softmax(-1).gather(1, following[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sampled.prompt_logprobs), raw, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(("neighbours", "chunk"), [(1, 512), (3, 7), (16, 64)])
def test_greedy_tokens(tiny_llama: Callable[..., Path], kind: str, neighbours: int, chunk: int) -> None:
    folder = tiny_llama()
    model = oracle(folder)
    prompts = [prompt_of(5 + 9 * i, i) for i in range(neighbours)]
    expected = [oracle_tokens(model, prompt, 64) for prompt in prompts]
    assert greedy(executor_for(folder, kind), prompts, 64, chunk) == expected


def served(executor: Executor, blocks: int, prompts: Sequence[Sequence[int]], steps: int) -> tuple[Any, Engine]:
    """Greedy tokens of all prompts through the whole engine, in chunks of at most 24 tokens."""
    limits = RunnerLimits(BLOCK, blocks, SLOTS, 512, TOTAL, 320)
    engine = Engine(LocalRunner(executor, limits), EngineSettings(max_batch_prefill_tokens=24))
    engine.start()
    tokens: list[list[int]] = [[] for _ in prompts]
    done = threading.Semaphore(0)

    def sink(_step: int, emissions: Sequence[Emission]) -> None:
        for one in emissions:
            tokens[one.request_id] += [token.id for token in one.tokens]
            if one.finish is not Finish.NONE:
                done.release()

    for number, prompt in enumerate(prompts):
        engine.submit(Request(number, tuple(prompt), steps), sink)
    assert all(done.acquire(timeout=100) for _ in prompts)
    return tokens, engine


@pytest.mark.parametrize("kind", EXECUTORS)
def test_greedy_tokens_with_preemptions_and_cached_prefixes(tiny_llama: Callable[..., Path], kind: str) -> None:
    folder = tiny_llama()
    model = oracle(folder)
    shared = prompt_of(40, 99)
    prompts = [shared[: 16 * (i % 3)] + prompt_of(6 + 5 * i, i) for i in range(8)]
    expected = [oracle_tokens(model, prompt, 64) for prompt in prompts]
    blocks = 22  # half of what these eight would need at once
    tokens, engine = served(executor_for(folder, kind, blocks), blocks, prompts, 64)
    assert tokens == expected
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] > 0
    engine.stop()
