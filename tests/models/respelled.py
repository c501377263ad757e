"""Checkpoints as their authors' files spell them, made from those that transformers writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import Make

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def respelled(
    make: Make, *, config: Callable[[Config], Config] = dict, tensors: Callable[[Tensors], Tensors] = dict
) -> Make:
    """The same checkpoint with another config.json and other tensors; transformers' own lies in the folder `plain`."""

    def write(folder: Path) -> None:
        make(folder / "plain")
        spelled = config(json.loads((folder / "plain" / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(spelled))
        renamed = tensors(load_file(folder / "plain" / "model.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, folder / "model.safetensors")

    return write


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_copies(tensors: Tensors) -> Tensors:
    """T5's first files: the word table once per stack, too, and a bias by distance that nothing reads."""
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")}
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return tensors | copies | {unread: torch.ones(16, 4), "lm_head.weight": tensors["shared.weight"].clone()}


def with_masks(tensors: Tensors) -> Tensors:
    """GPT-2's first files: no prefix, and each layer's mask among the weights."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256).tril() for layer in range(2)}
    return without_prefix(tensors) | masks | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}


def with_frequencies(tensors: Tensors) -> Tensors:
    """GPT-NeoX's files of transformers 4.20: masks and rotary frequencies among the weights."""
    under = [f"gpt_neox.layers.{layer}.attention." for layer in range(2)]
    masks = {name + "bias": torch.ones(1, 1, 256, 256).tril() for name in under}
    return tensors | masks | {name + "rotary_emb.inv_freq": torch.ones(2) for name in under}


def renamed(names: dict[str, str], *without: str, **more: Any) -> Callable[[Config], Config]:
    """Fields under other names, some left out, some added."""
    return lambda config: {names.get(key, key): value for key, value in config.items() if key not in without} | more


def older_rope(**names: str) -> Callable[[Config], Config]:
    """The rotary settings as single fields, which may have other names."""

    def rewrite(config: Config) -> Config:
        rope = config.pop("rope_parameters")
        del rope["rope_type"]
        return config | {names.get(key, key): value for key, value in rope.items()}

    return rewrite
