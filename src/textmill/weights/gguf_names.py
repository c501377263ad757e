"""One table row per GGUF architecture: its Hugging Face names and which rows llama.cpp's converter re-ordered."""

from __future__ import annotations

import re
from dataclasses import dataclass

from textmill.errors import ModelError
from textmill.weights.gguf import GgufFile


@dataclass(frozen=True, slots=True)
class Family:
    """`outer` and `block` map name stems (the part before .weight or .bias); `block` ones lie under `blk.N.`.

    `interleaved` lists block stems whose output rows were permuted, head by head, from half-split to interleaved
    rotary order, with the metadata key of their number of heads.
    """

    architecture: str
    model_type: str
    hidden_act: str
    layers: str
    outer: dict[str, str]
    block: dict[str, str]
    interleaved: dict[str, str]


_LLAMA = Family(
    architecture="llama",
    model_type="llama",
    hidden_act="silu",
    layers="model.layers",
    outer={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "rope_freqs": "rope_freqs",  # the divisors of llama3's rotary frequencies
    },
    block={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    interleaved={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in (_LLAMA,)}

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OUTER = re.compile(r"(.+)\.(weight|bias)")


def family_of(file: GgufFile) -> Family:
    """The row for this file's architecture; ModelError naming it if there is none."""
    architecture = file.metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{file.path}: general.architecture: {architecture!r} is not supported (known: {known})")
    if file.metadata.get(f"{architecture}.expert_count"):
        raise ModelError(f"{file.path}: {architecture}.expert_count: mixtures of experts are not supported in GGUF yet")
    return family


def hugging_face_name(family: Family, name: str) -> str:
    """A tensor's name as a Hugging Face checkpoint would spell it; unknown ones keep their own."""
    if match := _BLOCK.fullmatch(name):
        stem = family.block.get(match[2])
        return name if stem is None else f"{family.layers}.{match[1]}.{stem}.{match[3]}"
    if match := _OUTER.fullmatch(name):
        return f"{family.outer.get(match[1], match[1])}.{match[2]}"
    return name


def permuted_heads(family: Family, name: str) -> str | None:
    """The metadata key with the number of heads by which this tensor's rows were permuted, or None."""
    match = _BLOCK.fullmatch(name)
    return family.interleaved.get(match[2]) if match else None
