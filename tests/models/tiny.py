"""Tiny random float32 checkpoints, written by transformers' own classes and spread so that every mistake shows.

Matrices keep variances, biases are not zero and norm weights not one; tied embeddings are small, or a model would
only repeat its last token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

Make = Callable[[Path], None]
Adjust = Callable[[Any], None]

# What most families call their sizes.
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def sized(model_type: str, **changes: Any) -> Make:
    """A checkpoint of a family whose config speaks of `hidden_size` and so on; keywords go to the config."""
    return random_checkpoint(model_type, **(SIZES | changes))


def random_checkpoint(
    model_type: str,
    *,
    model_class: Any = AutoModelForCausalLM,
    seed: int = 0,
    embedding: float | None = None,
    final: float = 1.0,
    adjust: Adjust | None = None,
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **fields: Any,
) -> Make:
    """What writes a folder: config.json and model.safetensors under the hub's names.

    `embedding`: standard deviation of the token table (default 1, tied 0.1); `final`: factor on the last norm;
    `adjust` changes the model before it is saved, `rewrite` the saved config.json (to the style of hub files).
    """

    def make(folder: Path) -> None:
        model = model_class.from_config(AutoConfig.for_model(model_type, **fields)).float().eval()
        spread(model, seed, embedding, final)
        if adjust is not None:
            with torch.no_grad():
                adjust(model)
        model.save_pretrained(folder)
        if rewrite is not None:
            path = folder / "config.json"
            path.write_text(json.dumps(rewrite(json.loads(path.read_text()))))

    return make


@torch.no_grad()
def spread(model: Any, seed: int = 0, embedding: float | None = None, final: float = 1.0) -> None:
    """Draws every parameter anew; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    last_norm: nn.Module | None = None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            draw(module, name, parameter, generator)
            if parameter.ndim == 1 and "norm" in type(module).__name__.lower():
                last_norm = module
    table.normal_(0, embedding or (0.1 if tied else 1.0), generator=generator)
    if last_norm is not None and isinstance(last_norm.weight, torch.Tensor):
        last_norm.weight.mul_(final)


def draw(module: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if isinstance(module, nn.Embedding):
        parameter.normal_(0, 0.1, generator=generator)
    elif parameter.ndim >= 2:
        transposed = type(module).__name__ == "Conv1D"  # stores [inputs, outputs]
        inputs = parameter.shape[0] if transposed else parameter.shape[-1]
        parameter.normal_(0, 1.4 / inputs**0.5, generator=generator)
    elif name.endswith("bias"):
        parameter.uniform_(-0.3, 0.3, generator=generator)
    else:  # a norm's weight is one, or zero where the checkpoint stores it minus one
        middle = float(parameter.mean().round())
        parameter.uniform_(middle - 0.5, middle + 0.5, generator=generator)
