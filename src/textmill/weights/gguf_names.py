"""One table row per GGUF architecture: its Hugging Face names, and what llama.cpp's converter does to tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from textmill.errors import ModelError
from textmill.weights.gguf import GgufFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`outer` and `block` map name stems (the part before .weight or .bias); `block` ones lie under `blk.N.`.

    What llama.cpp's converter did, and we undo: output rows of `interleaved` stems were permuted, head by head, from
    half-split to interleaved rotary order (the value says whose heads: `q` or `k`); `by_head` ones were sorted from
    one piece per key head to [q; k; v]; to weights of `plus_one` stems one was added. `experts` were stacked: one of
    our tensors per expert, `{}` in its name. `split` stems hold several of ours, `joined` of ours lie in several.
    `decoder`: the stems under `dec.`, where those under `enc.` are `block`.
    """

    architecture: str
    model_type: str
    layers: str
    outer: dict[str, str]
    block: dict[str, str]
    interleaved: dict[str, str] = field(default_factory=dict)
    by_head: frozenset[str] = frozenset()
    plus_one: frozenset[str] = frozenset()
    experts: dict[str, str] = field(default_factory=dict)
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    decoder: dict[str, str] = field(default_factory=dict)


_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": "rope_freqs",  # the divisors of llama3's rotary frequencies
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROTARY = {"attn_q": "q", "attn_k": "k"}
_TRANSFORMER_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_FOUR_H = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
_FALCON_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    **_FOUR_H,
}
_T5_SELF = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
}


def _t5_feed(layer: int, *, gated: bool) -> dict[str, str]:
    stem = f"layer.{layer}.DenseReluDense"
    into = {"ffn_gate": f"{stem}.wi_0", "ffn_up": f"{stem}.wi_1"} if gated else {"ffn_up": f"{stem}.wi"}
    return into | {"ffn_norm": f"layer.{layer}.layer_norm", "ffn_down": f"{stem}.wo"}


_T5_CROSS = {
    "cross_attn_norm": "layer.1.layer_norm",
    **{f"cross_attn_{part}": f"layer.1.EncDecAttention.{part}" for part in "qkvo"},
}

_LLAMA = Family(
    architecture="llama",
    model_type="llama",
    layers="model.layers",
    outer=_OUTER,
    block=_ATTENTION | _GATED,
    interleaved=_ROTARY,
)
_MIXTRAL = replace(
    _LLAMA,
    model_type="mixtral",
    block=_ATTENTION | {"ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
)
_PLAIN = replace(_LLAMA, interleaved={})
_GEMMA2 = replace(
    _PLAIN,
    architecture="gemma2",
    model_type="gemma2",
    block=_ATTENTION | _FOUR_NORMS | _GATED,
    plus_one=frozenset((*_FOUR_NORMS, "output_norm", *_HEAD_NORMS)),
)
_GPT2 = Family(
    architecture="gpt2",
    model_type="gpt2",
    layers="transformer.h",
    outer=_TRANSFORMER_OUTER,
    block=_GPT2_BLOCK,
)
_FALCON = Family(
    architecture="falcon",
    model_type="falcon",
    layers="transformer.h",
    outer=_TRANSFORMER_OUTER | {"token_embd": "transformer.word_embeddings"},
    block=_FALCON_BLOCK,
    by_head=frozenset(("attn_qkv",)),
)
_FALCON_TWO_NORMS = replace(_FALCON, block=_FALCON_BLOCK | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"})
_T5 = Family(
    architecture="t5",
    model_type="t5",
    layers="block",
    outer={
        "token_embd": "shared",
        "output": "lm_head",
        "enc.output_norm": "encoder.final_layer_norm",
        "dec.output_norm": "decoder.final_layer_norm",
    },
    block=_T5_SELF | _t5_feed(1, gated=False),
    decoder=_T5_SELF | _T5_CROSS | _t5_feed(2, gated=False),
)
_T5_GATED = replace(
    _T5,
    block=_T5_SELF | _t5_feed(1, gated=True),
    decoder=_T5_SELF | _T5_CROSS | _t5_feed(2, gated=True),
)
_ROWS = (
    _LLAMA,
    replace(_PLAIN, architecture="qwen2", model_type="qwen2"),
    replace(_PLAIN, architecture="qwen3", model_type="qwen3", block=_ATTENTION | _HEAD_NORMS | _GATED),
    replace(
        _PLAIN,
        architecture="qwen3moe",
        model_type="qwen3_moe",
        block=_ATTENTION | _HEAD_NORMS | _GATED | {"ffn_gate_inp": "mlp.gate"},
        experts={
            "ffn_gate_exps": "mlp.experts.{}.gate_proj",
            "ffn_up_exps": "mlp.experts.{}.up_proj",
            "ffn_down_exps": "mlp.experts.{}.down_proj",
        },
    ),
    replace(
        _PLAIN,
        architecture="phi3",
        model_type="phi3",
        block=_ATTENTION
        | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
    ),
    replace(
        _PLAIN,
        architecture="phi2",
        model_type="phi",
        outer=_OUTER | {"output_norm": "model.final_layernorm"},
        block=_ATTENTION | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        split={"attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    ),
    replace(
        _PLAIN,
        architecture="gemma",
        model_type="gemma",
        plus_one=frozenset(("attn_norm", "ffn_norm", "output_norm")),
    ),
    _GEMMA2,
    replace(_GEMMA2, architecture="gemma3", model_type="gemma3_text", block=_GEMMA2.block | _HEAD_NORMS),
    _GPT2,
    replace(_GPT2, architecture="starcoder", model_type="gpt_bigcode"),
    replace(
        _PLAIN,
        architecture="starcoder2",
        model_type="starcoder2",
        block=_ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    Family(
        architecture="gptneox",
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        outer={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        block={
            "attn_norm": "input_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm",
            **_FOUR_H,
        },
        by_head=frozenset(("attn_qkv",)),
    ),
    _FALCON,
    replace(
        _FALCON,
        architecture="bloom",
        model_type="bloom",
        outer=_FALCON.outer | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
    ),
    Family(
        architecture="mpt",
        model_type="mpt",
        layers="transformer.blocks",
        outer=_TRANSFORMER_OUTER | {"output_norm": "transformer.norm_f"},
        block={
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_q_norm": "attn.q_ln",
            "attn_k_norm": "attn.k_ln",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
    ),
    replace(_PLAIN, architecture="command-r", model_type="cohere", block=_ATTENTION | _HEAD_NORMS | _GATED),
    Family(
        architecture="dbrx",
        model_type="dbrx",
        layers="transformer.blocks",
        outer=_TRANSFORMER_OUTER | {"output_norm": "transformer.norm_f"},
        block={
            "attn_norm": "norm_attn_norm.norm_1",
            "attn_output_norm": "norm_attn_norm.norm_2",
            "attn_qkv": "norm_attn_norm.attn.Wqkv",
            "attn_output": "norm_attn_norm.attn.out_proj",
            "ffn_gate_inp": "ffn.router.layer",
        },
        experts={  # the hub has all experts' in one tensor
            "ffn_gate_exps": "ffn.experts.mlp.{}.w1",
            "ffn_up_exps": "ffn.experts.mlp.{}.v1",
            "ffn_down_exps": "ffn.experts.mlp.{}.w2",
        },
    ),
    Family(
        architecture="mamba",
        model_type="mamba",
        layers="backbone.layers",
        outer={"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
        block={
            "attn_norm": "norm",
            "ssm_in": "mixer.in_proj",
            "ssm_conv1d": "mixer.conv1d",
            "ssm_x": "mixer.x_proj",
            "ssm_dt": "mixer.dt_proj",
            "ssm_a": "mixer.A_log",
            "ssm_d": "mixer.D",
            "ssm_out": "mixer.out_proj",
        },
    ),
    replace(
        _LLAMA,
        architecture="baichuan",
        model_type="baichuan",
        joined={"self_attn.W_pack": ("attn_q", "attn_k", "attn_v")},
    ),
    _T5,
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in _ROWS}

_BLOCK = re.compile(r"(?:(enc|dec)\.)?blk\.(\d+)\.(\w+)(?:\.(\d+))?(?:\.(weight|bias))?")
_OUTERMOST = re.compile(r"([\w.]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name taken apart: under which stack of blocks ("" for the only one), which block, stem and leaf.

    `expert`: its number in old files, which do not stack experts.
    """

    stack: str
    layer: int
    stem: str
    leaf: str
    expert: int | None = None


def family_of(file: GgufFile) -> Family:
    """The row for this file's architecture; ModelError naming it if there is none."""
    architecture = file.metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{file.path}: general.architecture: {architecture!r} is not supported (known: {known})")
    if family is _LLAMA and file.metadata.get(f"{architecture}.expert_count"):
        return _MIXTRAL
    if family is _FALCON and "blk.0.attn_norm_2.weight" in file.tensors:
        return _FALCON_TWO_NORMS
    if family is _T5 and "enc.blk.0.ffn_gate.weight" in file.tensors:
        return _T5_GATED
    return family


def taken_apart(name: str) -> Name | None:
    """The parts of a block's tensor's name, or None for a tensor outside the blocks."""
    match = _BLOCK.fullmatch(name)
    return (
        None
        if match is None
        else Name(match[1] or "", int(match[2]), match[3], match[5] or "", None if match[4] is None else int(match[4]))
    )


def place_of_block(family: Family, name: Name) -> str:
    """What our names of a block's tensors begin with."""
    if not name.stack:
        return f"{family.layers}.{name.layer}."
    return f"{'encoder' if name.stack == 'enc' else 'decoder'}.{family.layers}.{name.layer}."


def stems_of(family: Family, name: Name) -> dict[str, str]:
    return family.decoder if name.stack == "dec" else family.block


def outer_name(family: Family, name: str) -> str:
    """Our name of a tensor outside the blocks; unknown ones keep their own."""
    match = _OUTERMOST.fullmatch(name)
    return name if match is None else f"{family.outer.get(match[1], match[1])}.{match[2]}"
