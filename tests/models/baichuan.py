"""Baichuan, which transformers lacks: a tiny checkpoint and what it must compute, in plain torch without a cache."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.models.parity import Oracle
from tests.models.tiny import Make

LAYERS, WIDTH, FEED, VOCABULARY, EPS = 2, 48, 96, 160, 1e-6


def baichuan(*, heads: int, alibi: bool, normed_head: bool, seed: int = 0) -> Make:
    """A checkpoint folder as the authors' files lie in it; 13B configs name no max_position_embeddings."""
    config: dict[str, Any] = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": FEED,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "norm_head": normed_head,
        "tie_word_embeddings": False,
        "model_max_length" if alibi else "max_position_embeddings": 256,
    }

    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights(seed), folder / "model.safetensors")

    return make


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, spread: float = 1.4) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0, spread / columns**0.5, generator=generator)

    def norm() -> torch.Tensor:
        return torch.empty(WIDTH).uniform_(0.5, 1.5, generator=generator)

    lengths = torch.empty(VOCABULARY, 1).uniform_(0.5, 2.0, generator=generator)  # rows that a normed head makes equal
    found = {
        "model.embed_tokens.weight": matrix(VOCABULARY, WIDTH, 8.0),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCABULARY, WIDTH) * lengths,
    }
    for layer in range(LAYERS):
        under = f"model.layers.{layer}."
        found |= {
            under + "input_layernorm.weight": norm(),
            under + "post_attention_layernorm.weight": norm(),
            under + "self_attn.W_pack.weight": matrix(3 * WIDTH, WIDTH),
            under + "self_attn.o_proj.weight": matrix(WIDTH, WIDTH),
            under + "mlp.gate_proj.weight": matrix(FEED, WIDTH),
            under + "mlp.up_proj.weight": matrix(FEED, WIDTH),
            under + "mlp.down_proj.weight": matrix(WIDTH, FEED),
        }
        if layer == 0:
            found[under + "self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old files have them
    return found


def reference(folder: Path) -> Oracle:
    """The published architecture, written out: every token's logits from the whole sequence at once."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")

    def logits(prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return forward(config, tensors, torch.tensor([*prompt, *continuation]))[len(prompt) - 1 :]

    return logits


def forward(config: dict[str, Any], w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    heads = config["num_attention_heads"]
    count, width = len(tokens), WIDTH // heads
    distance = torch.arange(count)[None, :] - torch.arange(count)[:, None]
    mask = torch.zeros(heads, count, count).masked_fill(distance > 0, -torch.inf)
    rotary = "max_position_embeddings" in config
    if not rotary:
        mask = mask + torch.tensor(slopes(heads))[:, None, None] * distance
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        under = f"model.layers.{layer}."
        normed = rms(x, w[under + "input_layernorm.weight"])
        q, k, v = (normed @ w[under + "self_attn.W_pack.weight"].T).view(count, 3, heads, width).unbind(1)
        if rotary:
            q, k = turn(q), turn(k)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(width) + mask
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(count, WIDTH)
        x = x + mixed @ w[under + "self_attn.o_proj.weight"].T
        normed = rms(x, w[under + "post_attention_layernorm.weight"])
        gate, up = (normed @ w[f"{under}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[under + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    return rms(x, w["model.norm.weight"]) @ (F.normalize(head) if config["norm_head"] else head).T


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def turn(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x [tokens, heads, width], halves as pairs."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)


def slopes(heads: int) -> list[float]:
    """ALiBi's published recursion: a power of two, then every second slope of the next one."""
    if math.log2(heads).is_integer():
        first = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [first ** (i + 1) for i in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return slopes(power) + slopes(2 * power)[0::2][: heads - power]
