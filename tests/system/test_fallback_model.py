"""A checkpoint that textmill has no file for, over HTTP: transformers' model, its own greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import sized

if TYPE_CHECKING:
    from conftest import Server


def test_a_model_of_another_family_is_served(launch: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "olmo"
    sized("olmo", eos_token_id=None)(folder)
    words = {f"w{number}": number for number in range(160)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    prompt = [5, 17, 140, 3, 99]
    server = launch("--model-id", str(folder), "--max-total-tokens", "64", "--speculate", "2")
    body = {"inputs": " ".join(f"w{n}" for n in prompt), "parameters": {"max_new_tokens": 16, "details": True}}
    status, _, answer = server.post("/generate", body)
    assert status == 200, answer
    found: Any = answer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert [token["id"] for token in found["details"]["tokens"]] == expected.tolist()
    log = server.log.read_text()
    assert "transformers runs it" in log
    assert "--speculate is off" in log
    assert "the prefix cache is off" in log
