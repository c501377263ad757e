"""Which file serves a checkpoint: its `model_type`, by name or by alias."""

from __future__ import annotations

import importlib

from textmill.errors import ModelError
from textmill.layers.causal_lm import CausalLM
from textmill.weights.config import ModelConfig
from textmill.weights.view import View

# model_type → module in this package. Families share a file only where it has no branch that tells them apart.
FAMILIES = {
    "baichuan": "baichuan",
    "bloom": "bloom",
    "cohere": "cohere",
    "dbrx": "dbrx",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3_text",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neox": "gpt_neox",
    "idefics": "idefics",
    "idefics2": "idefics2",
    "llama": "llama",
    "llava_next": "llava_next",
    "mamba": "mamba",
    "mistral": "llama",
    "mixtral": "mixtral",
    "mpt": "mpt",
    "opt": "opt",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "santacoder": "santacoder",
    "starcoder2": "starcoder2",
    "t5": "t5",
}


def has_family(model_type: str) -> bool:
    """True if a file of ours serves such checkpoints."""
    return model_type in FAMILIES


def build_model(c: ModelConfig, w: View) -> CausalLM:
    """The model of a checkpoint, its small tensors read, its matrices bound by name."""
    module = FAMILIES.get(c.model_type)
    if module is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model_type {c.model_type!r} is not supported yet (supported: {known})")
    model: CausalLM = importlib.import_module(f"textmill.models.{module}").Model(c, w)
    return model
