"""Llama from GGUF files of every packed type: the native program computes what the torch reference means.

Random blocks of hidden size 256, so that the K types fit; both executors read the same file, packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from textmill.core import Admission, Sampling, SlotWork, Step
from textmill.kernels.dispatch import native_available
from textmill.kernels.native import Program
from textmill.models.registry import build_model
from textmill.runner.native_executor import NativeExecutor
from textmill.runner.slots import apply
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

pytestmark = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

HIDDEN, FEED, HEADS, KV_HEADS, VOCABULARY, LAYERS = 256, 512, 4, 2, 96, 2
KINDS = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"]


def blocks_of(kind: gguf.GGMLQuantizationType, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """A tensor's raw blocks with weights of about 1/sqrt(columns); K types, which gguf cannot make, at random."""
    values = generator.standard_normal((rows, columns)).astype(np.float32) * (0.7 / columns**0.5)
    if kind.name not in ("Q4_K", "Q6_K"):
        return gguf.quants.quantize(values, kind)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (rows, columns // size, width), dtype=np.uint8)
    scale = np.full((rows, columns // size, 1), 2e-5, np.float16)
    places = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind.name]  # d (and dmin) are the only floats of a block
    for place in places:
        raw[:, :, place : place + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def write(path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    generator = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)

    def packed(tensor: str, rows: int, columns: int) -> None:
        writer.add_tensor(tensor, blocks_of(kind, rows, columns, generator), raw_dtype=kind)

    def norm(tensor: str) -> None:
        writer.add_tensor(tensor, generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32))

    writer.add_tensor("token_embd.weight", generator.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    packed("output.weight", VOCABULARY, HIDDEN)
    norm("output_norm.weight")
    key = HIDDEN * KV_HEADS // HEADS
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm.weight")
        norm(prefix + "ffn_norm.weight")
        for part, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", key, HIDDEN),
            ("attn_v", key, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FEED, HIDDEN),
            ("ffn_up", FEED, HIDDEN),
            ("ffn_down", HIDDEN, FEED),
        ):
            packed(f"{prefix}{part}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def executors(path: Path) -> tuple[TorchExecutor, NativeExecutor]:
    def model() -> Any:
        checkpoint = open_checkpoint(path)
        assert checkpoint.packed
        return build_model(checkpoint.config, View(checkpoint))

    program = Program(max_rows=64, max_slots=1, max_total_tokens=128, vocab_size=VOCABULARY, kv_dtype="float32")
    native = NativeExecutor(model(), program, "packed")
    program.allocate(8)
    return TorchExecutor(model(), 1, 128, 16, 8), native


@pytest.mark.parametrize("kind", KINDS)
def test_native_equals_reference(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "tiny.gguf", kind)
    plain, native = executors(tmp_path / "tiny.gguf")
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(0, VOCABULARY, 40))
    admission = Admission(0, prompt, Sampling(), prompt_logprobs=True)
    for executor in (plain, native):
        apply(Step(0, (), (admission,), (), ((0, 0, tuple(range(8))),)), executor.tables)
    plain.run([SlotWork(0, 0, 40, False)])
    found = torch.from_numpy(native.program.logits(np.array([(0, 0, 40, 0)], np.int32)))
    spread = float(plain.logits.std())
    assert spread > 0.1
    # A value on the edge between two activation codes may round either way after float additions in another order:
    # one code of 127. A wrong scale, row or nibble moves most logits by their whole spread.
    error = (found - plain.logits).abs() / spread
    assert float(error.median()) < 1e-2
    assert float(error.max()) < 0.1
