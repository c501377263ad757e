"""Checkpoints of the families that llama.cpp has, as GGUF files: the logits of the folder that they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.models.parity import TOLERANCE, TOTAL, Case, admit, record
from tests.models.test_parity import CASES
from tests.models.to_gguf import ARCHITECTURES, to_gguf
from textmill.core import SlotWork
from textmill.models.registry import build_model
from textmill.runner.torch_executor import TorchExecutor
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
    "gpt2-old_files": LAYOUT,
    "falcon-RefinedWebModel": LAYOUT,
    "falcon-RefinedWeb": LAYOUT,
    "mamba-first_releases": LAYOUT,
    "falcon-rw": "no ALiBi, no block in sequence",
    "gpt2-scaled_by_layer": "no such key",
    "bloom-six_heads": "no residual behind the norm",
    "dbrx-weights_normed_by_their_squares": "no such key",
    "dbrx-weights_as_they_are": "no such key",
    "qwen3_moe-one_layer_without_experts": "no such key",
    "phi-normed_queries_and_keys": "no such tensors",
    "llama-rope_yarn,_own_scales": "no such keys",
    "baichuan-13B": "known by its 40 layers",
    "baichuan-2_13B": "known by its 40 layers",
    "baichuan-2_7B": "known by its vocabulary",
}
# What is not in the file and has one value for all models: checkpoints with another one are given that.
SETTLED = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "t5": {"relative_attention_max_distance": 128},
}
HELD = [case for case in CASES if case.family in ARCHITECTURES and case.id not in LOST]


def settle(case: Case, folder: Path) -> None:
    path, given = folder / "config.json", dict(SETTLED.get(case.family, {}))
    if case.family == "t5":  # whose head is the embedding
        with safe_open(folder / "model.safetensors", "pt") as file:
            given["scale_decoder_outputs"] = "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    path.write_text(json.dumps(json.loads(path.read_text()) | given))


def logits_of(path: Path, prompt: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(path, dequantize=True)
    executor = TorchExecutor(build_model(checkpoint.config, View(checkpoint)), 2, TOTAL, 16, 32)
    admit(executor, 0, prompt, all_logits=True)
    executor.run([SlotWork(0, 0, len(prompt), True)])
    assert checkpoint.unread() == []
    return executor.logits


@pytest.mark.parametrize("case", HELD, ids=[case.id for case in HELD])
def test_a_gguf_file_equals_its_folder(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    case.make(folder)
    settle(case, folder)
    to_gguf(folder, tmp_path / "model.gguf")
    prompt = torch.randint(3, 160, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    found, expected = logits_of(tmp_path / "model.gguf", prompt), logits_of(folder, prompt)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    record(case, gguf=True)
