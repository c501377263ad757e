"""What lies behind a window may be anybody's: no executor lets a block there change a bit, not even one full of NaN."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.parity import EXECUTORS
from tests.models.tiny import sized
from textmill.config import Settings
from textmill.core import Admission, Emission, Request, RunnerLimits, Sampling, SlotWork, Step
from textmill.engine.engine import Engine
from textmill.errors import ConfigError
from textmill.kernels.native import Program
from textmill.kernels.spec import KEY_TILE, AttentionSpec
from textmill.layers.memory import Memory
from textmill.models.registry import build_model
from textmill.runner.build import build_runner
from textmill.runner.native_executor import NativeExecutor
from textmill.runner.runner import Executor, LocalRunner
from textmill.runner.slots import apply
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.source import ModelSource
from textmill.weights.view import View

BLOCK, TOTAL, WINDOW = 16, 320, 24
POISON = 7  # a token whose embedding is infinite; the model never chooses it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("window")
    sized("mistral", sliding_window=WINDOW)(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.inf
    tensors["lm_head.weight"][POISON] = 0.0
    save_file(tensors, path / "model.safetensors")
    return path


def executor_for(folder: Path, kind: str, blocks: int = TOTAL // BLOCK + 1, slots: int = 2) -> tuple[Executor, int]:
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint.config, View(checkpoint))
    if kind == "torch":
        return TorchExecutor(model, slots, TOTAL, BLOCK, blocks), model.memory.reach
    sizes = {"max_rows": 512, "max_slots": slots, "max_total_tokens": TOTAL, "block_size": BLOCK}
    program = Program(**sizes, vocab_size=checkpoint.config.vocab_size, kv_dtype="float32", threads=2)
    executor = NativeExecutor(model, program, "float32")
    program.allocate(blocks)
    return executor, model.memory.reach


def admit(executor: Executor, slot: int, tokens: Sequence[int], blocks: Sequence[int]) -> None:
    admission = Admission(slot, tuple(tokens), Sampling())
    apply(Step(0, (), (admission,), (), ((slot, 0, tuple(blocks)),)), executor.tables)


def choices(executor: Executor, chunks: Sequence[int], steps: int, reach: int, poisoned: bool) -> list[object]:
    """A prompt in chunks, then decode steps; before each, blocks that are out of reach become the poisoned one."""
    prompt = np.random.default_rng(0).integers(8, 150, sum(chunks)).tolist()
    last = TOTAL // BLOCK
    admit(executor, 1, [POISON] * BLOCK, [last])
    assert executor.run([SlotWork(1, 0, BLOCK, True)])[0].error
    admit(executor, 0, prompt, range(last))
    found: list[object] = []
    start = 0
    for count in (*chunks, *[1] * steps):
        if poisoned:
            executor.tables.block_table[0, : max(0, start - reach + 1) // BLOCK] = last
        start += count
        found.append(executor.run([SlotWork(0, start - count, count, start >= len(prompt))])[0])
    return found


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("chunks", [(37, 90, 70, 3), (200,)])
def test_freed_blocks_are_never_read(folder: Path, kind: str, chunks: tuple[int, ...]) -> None:
    executor, reach = executor_for(folder, kind)
    assert reach == WINDOW + KEY_TILE - 1
    clean = choices(executor, chunks, 100, reach, poisoned=False)
    assert not any(getattr(one, "error", "") for one in clean)
    executor, reach = executor_for(folder, kind)
    assert choices(executor, chunks, 100, reach, poisoned=True) == clean


def served(
    folder: Path, kind: str, blocks: int, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], dict[str, float]]:
    """Greedy tokens of all prompts at once through the whole engine, up to the longest sequence there can be."""
    executor, reach = executor_for(folder, kind, blocks, len(prompts))
    limits = RunnerLimits(BLOCK, blocks, len(prompts), 32, TOTAL, 160, reach)
    engine = Engine(LocalRunner(executor, limits))
    engine.start()
    tokens: list[list[int]] = [[] for _ in prompts]
    done = threading.Semaphore(0)

    def sink(_step: int, emissions: Sequence[Emission]) -> None:
        for one in emissions:
            tokens[one.request_id] += [token.id for token in one.tokens]
            if one.finish:
                done.release()

    for number, prompt in enumerate(prompts):
        engine.submit(Request(number, tuple(prompt), TOTAL), sink)
    assert all(done.acquire(timeout=100) for _ in prompts)
    stats = engine.stats()
    engine.stop()
    return tokens, stats


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_row_that_is_not_finite_fails_alone(folder: Path, kind: str) -> None:
    """Though the next step, launched before that shows, counts on its token."""
    good = np.random.default_rng(2).integers(8, 150, 40).tolist()
    alone, _ = served(folder, kind, 99, [good])
    both, stats = served(folder, kind, 99, [good, [POISON] * 20])
    assert both == [alone[0], []]
    assert stats["requests_failed"] == 1


@pytest.mark.parametrize("kind", EXECUTORS)
def test_long_sequences_in_few_blocks(folder: Path, kind: str) -> None:
    """Three that need 57 blocks, all of them once, in 27; then one in fewer than it has tokens."""
    prompts = [np.random.default_rng(seed).integers(8, 150, 150 + seed).tolist() for seed in (0, 2, 3)]
    roomy, _ = served(folder, kind, 99, prompts)
    assert [len(prompt) + len(found) for prompt, found in zip(prompts, roomy, strict=True)] == [TOTAL] * 3
    tight, stats = served(folder, kind, 27, prompts)
    assert tight == roomy
    assert stats["preemptions"] == 0
    alone, _ = served(folder, kind, 12, prompts[:1])
    assert alone == roomy[:1]


def test_only_models_whose_every_layer_looks_back_a_window_leave_blocks() -> None:
    windows = [AttentionSpec(heads=2, kv_heads=1, head_dim=8, scale=1.0, window=w) for w in (24, 100, 0)]
    limits = RunnerLimits(16, 99, 4, 64, 1000, 50)
    assert Memory(tuple(windows[:2])).limited(limits).reach == 100 + KEY_TILE - 1
    assert Memory(tuple(windows)).limited(limits).reach == 0
    assert Memory().limited(limits).reach == 0
    assert Memory(tuple(windows[:2])).limited(RunnerLimits(16, 99, 4, 64, 128, 50)).reach == 0


def test_the_longest_request_may_be_longer_than_the_cache(tmp_path: Path) -> None:
    settings = Settings(max_total_tokens=4096, max_batch_total_tokens=1200, max_batch_size=2)
    for name, window in (("narrow", WINDOW), ("wide", 2000), ("none", None)):
        sized("mistral", sliding_window=window, max_position_embeddings=4096)(tmp_path / name)
    source = ModelSource("m", tmp_path / "narrow", "safetensors", "")
    runner, info = build_runner(settings, source, lambda *_, **__: None)
    runner.close()
    assert (info.max_total_tokens, info.max_batch_total_tokens) == (4096, 1200)
    for name in ("wide", "none"):
        with pytest.raises(ConfigError, match="Not enough memory to handle `max_total_tokens=4096`"):
            build_runner(settings, replace(source, path=tmp_path / name), lambda *_, **__: None)
