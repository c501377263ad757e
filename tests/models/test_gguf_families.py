"""Checkpoints of the families that llama.cpp has, as GGUF files: the logits of the folder that they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.models.parity import TOLERANCE, TOTAL, Case, admit, record
from tests.models.test_parity import CASES
from tests.models.to_gguf import ARCHITECTURES, to_gguf
from textmill.core import SlotWork
from textmill.kernels import native
from textmill.kernels.native import Program
from textmill.models.registry import build_model
from textmill.quant.packed import Packed
from textmill.runner.native_executor import NativeExecutor
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights import gguf_config
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

# What llama.cpp's files or graphs cannot hold, by case.
WINDOW, LAYOUT = "the window is not in the file", "the same model in other files"
LOST = {
    "mistral-window": WINDOW,
    "mixtral-window,_one_expert_a_row": WINDOW,
    "starcoder2-window": WINDOW,
    "qwen2-window_on_later_layers": WINDOW,
    "mixtral-experts_in_two_tensors": LAYOUT,
    "mamba-first_releases": LAYOUT,
    "falcon-rw": "no ALiBi, no block in sequence",
    "gpt2-scaled_by_layer": "no such key",
    "bloom-six_heads": "no residual behind the norm",
    "dbrx-weights_normed_by_their_squares": "no such key",
    "dbrx-weights_as_they_are": "no such key",
    "qwen3_moe-one_layer_without_experts": "no such key",
    "phi-normed_queries_and_keys": "no such tensors",
    "llama-rope_yarn,_own_scales": "no such keys",
}
# What is not in the file and has one value for all models: checkpoints with another one are given that.
SETTLED = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "t5": {"relative_attention_max_distance": 128},
}
HELD = [case for case in CASES if case.family in ARCHITECTURES and case.id not in LOST]


def test_what_files_cannot_hold_is_named_by_its_case() -> None:
    cases = {case.id: case for case in CASES}
    assert set(LOST) <= set(cases)
    for name, reason in LOST.items():
        record(cases[name], no_gguf=reason)


def settle(case: Case, folder: Path) -> None:
    path, given = folder / "config.json", dict(SETTLED.get(case.family, {}))
    if case.family == "t5":  # whose head is the embedding
        with safe_open(folder / "model.safetensors", "pt") as file:
            given["scale_decoder_outputs"] = "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    path.write_text(json.dumps(json.loads(path.read_text()) | given))


def as_large(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baichuan's larger model is known by its 40 layers, the second one by its vocabulary: tiny ones have neither."""
    own, normed = gguf_config.EXTRAS["baichuan"], case.variant.startswith("2")
    monkeypatch.setattr(gguf_config, "ALIBI_LAYERS", 2 if case.variant.endswith("13B") else 40)
    monkeypatch.setitem(gguf_config.EXTRAS, "baichuan", lambda m, raw: own(m, raw) | {"norm_head": normed})


def logits_of(path: Path, prompt: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(path, dequantize=True)
    executor = TorchExecutor(build_model(checkpoint.config, View(checkpoint)), 2, TOTAL, 16, 32)
    admit(executor, 0, prompt, all_logits=True)
    executor.run([SlotWork(0, 0, len(prompt), True)])
    assert checkpoint.unread() == []
    return executor.logits


@pytest.mark.parametrize("case", HELD, ids=[case.id for case in HELD])
def test_a_gguf_file_equals_its_folder(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    case.make(folder)
    if case.family == "baichuan":
        as_large(case, monkeypatch)
    settle(case, folder)
    to_gguf(folder, tmp_path / "model.gguf")
    prompt = torch.randint(3, 160, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    found, expected = logits_of(tmp_path / "model.gguf", prompt), logits_of(folder, prompt)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    record(case, gguf=True)


# Of each way in which stored rows become ours one case: as they are, in pieces, of a stack, turned round.
PACKED = ["gpt2-plain", "falcon-40b", "gpt_neox-parallel", "llama-grouped", "mixtral-an_expert's_matrices_on_their_own"]


@pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")
@pytest.mark.parametrize("case", [case for case in HELD if case.id in PACKED], ids=lambda case: case.family)
def test_packed_matrices_are_those_of_the_float_path(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    case.make(folder)
    path = tmp_path / "model.gguf"
    to_gguf(folder, path, "Q8_0")
    packed, floats = open_checkpoint(path), open_checkpoint(path, dequantize=True)
    found = {name: matrix for name in packed.names() if isinstance(matrix := packed.matrix(name), Packed)}
    assert len(found) > 8
    for name, matrix in found.items():
        whole = floats.matrix(name)
        assert np.array_equal(matrix.dequantize(), whole), name
        half, some = range(len(whole) // 2, len(whole)), np.arange(0, len(whole), 3)[::-1].copy()  # as ranks read
        assert np.array_equal(packed.matrix(name, half).dequantize(), whole[half.start :]), name
        assert np.array_equal(packed.matrix(name, some, range(32)).dequantize(), whole[some, :32]), name
    prompt = torch.randint(3, 160, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    program = Program(max_rows=64, max_slots=1, max_total_tokens=TOTAL, vocab_size=160, kv_dtype="float32")
    executor = NativeExecutor(build_model(packed.config, View(packed)), program, "packed")
    program.allocate(TOTAL // 16)
    admit(executor, 0, prompt, all_logits=True)
    logits = torch.from_numpy(program.logits(np.array([(0, 0, len(prompt), 0)], np.int32)))
    expected = logits_of(path, prompt)
    error = (logits - expected).abs() / expected.std()
    assert float(error.median()) < 0.05  # activations are rounded to 8 bits; a wrong row would move logits by 1
