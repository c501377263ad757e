"""Mixtures of experts from GGUF files: stacked experts stay packed; native programs compute what torch means."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.models.test_packed_gguf import HEADS, HIDDEN, KV_HEADS, VOCABULARY, blocks_of, executors
from textmill.core import Admission, Sampling, SlotWork, Step
from textmill.kernels.dispatch import native_available
from textmill.quant.packed import Packed
from textmill.runner.slots import apply
from textmill.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")

EXPERTS, INNER = 4, 256
NAMES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_norm"),
    "dbrx": ("attn_qkv", "attn_output", "attn_norm", "attn_output_norm"),
}
EXPERT = {
    "llama": "model.layers.0.block_sparse_moe.experts.3.w2.weight",
    "dbrx": "transformer.blocks.0.ffn.experts.mlp.3.w2.weight",
}


def write(path: Path, architecture: str, kind: gguf.GGMLQuantizationType, *, stacked: bool = True) -> None:
    generator = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(VOCABULARY)
    key = HIDDEN * KV_HEADS // HEADS
    rows = {"attn_q": HIDDEN, "attn_k": key, "attn_v": key, "attn_qkv": HIDDEN + 2 * key, "attn_output": HIDDEN}
    for stem in NAMES[architecture]:
        if stem in rows:
            writer.add_tensor(f"blk.0.{stem}.weight", blocks_of(kind, rows[stem], HIDDEN, generator), raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.0.{stem}.weight", generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    for stem, outputs, inputs in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
        blocks = blocks_of(kind, EXPERTS * outputs, inputs, generator).reshape(EXPERTS, outputs, -1)
        if stacked:
            writer.add_tensor(f"blk.0.ffn_{stem}_exps.weight", blocks, raw_dtype=kind)
        else:
            for expert in range(EXPERTS):
                writer.add_tensor(f"blk.0.ffn_{stem}.{expert}.weight", blocks[expert], raw_dtype=kind)
    router = generator.standard_normal((EXPERTS, HIDDEN)).astype(np.float32) * 0.1
    writer.add_tensor("blk.0.ffn_gate_inp.weight", router)
    writer.add_tensor("token_embd.weight", generator.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    writer.add_tensor("output.weight", blocks_of(kind, VOCABULARY, HIDDEN, generator), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("architecture", list(NAMES))
def test_native_equals_reference(tmp_path: Path, architecture: str, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, architecture, gguf.GGMLQuantizationType[kind])
    assert isinstance(open_checkpoint(path).matrix(EXPERT[architecture]), Packed)
    plain, native = executors(path)
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(0, VOCABULARY, 40))
    admission = Admission(0, prompt, Sampling(), prompt_logprobs=True)
    for executor in (plain, native):
        apply(Step(0, (), (admission,), (), ((0, 0, tuple(range(8))),)), executor.tables)
    plain.run([SlotWork(0, 0, 40, False)])
    found = torch.from_numpy(native.program.logits(np.array([(0, 0, 40, 0)], np.int32)))
    spread = float(plain.logits.std())
    assert spread > 0.05
    error = (found - plain.logits).abs() / spread
    # A code on the edge rounds either way (see test_packed_gguf), and may send a row to another expert.
    assert float(error.median()) < 1e-2
    assert float((error.amax(1) > 0.1).float().mean()) < 0.1


def test_old_files_have_a_tensor_per_expert(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_0
    write(tmp_path / "new.gguf", "llama", kind)
    write(tmp_path / "old.gguf", "llama", kind, stacked=False)
    new, old = (open_checkpoint(tmp_path / name) for name in ("new.gguf", "old.gguf"))
    assert sorted(new.names()) == sorted(old.names())
    for name in new.names():
        one, other = new.matrix(name), old.matrix(name)
        if isinstance(one, Packed) and isinstance(other, Packed):
            one, other = one.dequantize(), other.dequantize()
        assert np.array_equal(one, other)
