"""Writes a tiny hub checkpoint as the GGUF file that llama.cpp's converter makes of it: its names, keys and layouts.

Names come from the `gguf` package's own table; what is done to which tensor is written down here once more, forwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

Tensors = dict[str, np.ndarray]
# model_type of a checkpoint -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "phi": "phi2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "falcon": "falcon",
    "mpt": "mpt",
    "bloom": "bloom",
    "gpt_bigcode": "starcoder",
    "starcoder2": "starcoder2",
    "cohere": "command-r",
    "dbrx": "dbrx",
    "mamba": "mamba",
    "t5": "t5",
    "baichuan": "baichuan",
}


def to_gguf(folder: Path, path: Path, quantization: str = "") -> None:
    """`quantization` (Q8_0, say) goes to matrices whose rows it fits; everything else stays float32."""
    raw = json.loads((folder / "config.json").read_text())
    kind = raw["model_type"]
    config = SimpleNamespace(**raw) if kind == "baichuan" else AutoConfig.for_model(**with_original(raw))
    config.raw = raw
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    architecture = ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata(kind, config, tensors).items():
        add(writer, f"{architecture}.{key}", value)
    writer.add_token_list([f"w{number}" for number in range(160)])
    writer.add_tokenizer_model("gpt2")
    writer.add_eos_token_id(2)
    for name, value in stored(kind, architecture, config, tensors).items():
        packs = quantization and value.ndim >= 2 and value.shape[-1] % 32 == 0 and "ssm_" not in name
        if packs:
            type_ = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_original(raw: dict[str, Any]) -> dict[str, Any]:
    """The trained length, which hub files may have beside the rope's settings, also among them."""
    scaling, length = raw.get("rope_scaling"), raw.get("original_max_position_embeddings")
    if not isinstance(scaling, dict) or length is None:
        return raw
    return raw | {"rope_scaling": scaling | {"original_max_position_embeddings": length}}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


# Metadata


def metadata(kind: str, c: Any, tensors: Tensors) -> dict[str, Any]:
    hidden = field(c, "hidden_size", "d_model", "n_embd")
    heads = field(c, "num_attention_heads", "n_heads", "num_heads", "n_head")
    keys: dict[str, Any] = {
        "context_length": field(c, "max_position_embeddings", "max_seq_len", "model_max_length", "n_positions") or 512,
        "embedding_length": hidden,
        "block_count": field(c, "num_hidden_layers", "n_layers", "n_layer", "num_layers"),
        "attention.head_count": heads or 0,
        "feed_forward_length": feed_forward(kind, c, tensors),
    }
    epsilon = field(c, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") or 1e-5
    layer_norm = kind in LAYER_NORMED
    keys["attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"] = float(epsilon)
    if heads:
        keys["attention.head_count_kv"] = key_heads(kind, c, heads)
    if getattr(c, "head_dim", None) and not kind.startswith(("falcon", "cohere")):
        keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    keys |= rope(kind, c)
    own = OWN_KEYS.get(kind)
    return keys | ({} if own is None else own(c))


LAYER_NORMED = {
    "gpt2", "gpt_neox", "falcon", "mpt", "bloom", "gpt_bigcode", "starcoder2", "phi", "cohere", "dbrx",
}  # fmt: skip


def field(c: Any, *names: str) -> Any:
    return next((getattr(c, name) for name in names if getattr(c, name, None) is not None), None)


def key_heads(kind: str, c: Any, heads: int) -> int:
    if kind == "falcon":
        return c.num_kv_heads if c.new_decoder_architecture else 1 if c.multi_query else heads
    if kind == "gpt_bigcode":
        return 1 if c.multi_query else heads
    if kind in ("dbrx", "mpt"):
        return c.raw["attn_config"].get("kv_n_heads") or heads
    return field(c, "num_key_value_heads") or heads


def feed_forward(kind: str, c: Any, tensors: Tensors) -> int:
    if kind == "mamba":
        return 0
    if kind == "dbrx":
        return c.ffn_config.ffn_hidden_size
    inner = field(c, "intermediate_size", "n_inner", "ffn_hidden_size", "d_ff")
    return inner or int(getattr(c, "expansion_ratio", 4) * field(c, "hidden_size", "d_model", "n_embd"))


def rope(kind: str, c: Any) -> dict[str, Any]:
    if kind in ("gpt2", "mpt", "bloom", "gpt_bigcode", "mamba", "t5") or not (field(c, "num_attention_heads")):
        return {}
    parameters = getattr(c, "rope_parameters", None) or {}
    near = parameters.get("sliding_attention")
    parameters = parameters.get("full_attention", parameters)
    base = parameters.get("rope_theta", 10000.0)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    share = parameters.get("partial_rotary_factor") or 1.0
    keys: dict[str, Any] = {"rope.freq_base": float(base), "rope.dimension_count": int(head_dim * share)}
    if near is not None:
        keys["rope.freq_base_swa"] = float(near["rope_theta"])
    scaling = parameters.get("rope_type", "default")
    if scaling in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling, "rope.scaling.factor": float(parameters["factor"])}
    if scaling in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = int(
            parameters.get("original_max_position_embeddings") or c.original_max_position_embeddings
        )
    if scaling == "longrope":
        factor = c.max_position_embeddings / keys["rope.scaling.original_context_length"]
        original = keys["rope.scaling.original_context_length"]
        keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(factor) / np.log(original))) if factor > 1 else 1.0
    return keys


def capped(c: Any) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": c.attn_logit_softcapping,
        "final_logit_softcapping": c.final_logit_softcapping,
    }
    return {key: float(cap) for key, cap in caps.items() if cap} | {"attention.sliding_window": c.sliding_window}


def t5(c: Any) -> dict[str, Any]:
    return {
        "attention.key_length": c.d_kv,
        "attention.value_length": c.d_kv,
        "attention.layer_norm_epsilon": float(c.layer_norm_epsilon),
        "attention.relative_buckets_count": c.relative_attention_num_buckets,
        "decoder_start_token_id": c.decoder_start_token_id,
        "decoder_block_count": c.num_decoder_layers,
    }


OWN_KEYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mixtral": lambda c: {"expert_count": c.num_local_experts, "expert_used_count": c.num_experts_per_tok},
    "qwen3_moe": lambda c: {"expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok},
    "phi3": lambda c: {"attention.sliding_window": c.sliding_window} if c.sliding_window else {},
    "gemma2": capped,
    "gemma3_text": lambda c: {
        "attention.sliding_window": c.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in c.layer_types],
    },
    "gpt_neox": lambda c: {"use_parallel_residual": c.use_parallel_residual},
    "mpt": lambda c: (
        {"attention.max_alibi_bias": float(c.attn_config.alibi_bias_max if c.raw["attn_config"]["alibi"] else 0)}
        | ({"attention.clamp_kqv": float(c.attn_config.clip_qkv)} if c.attn_config.clip_qkv else {})
    ),
    "cohere": lambda c: {"logit_scale": float(c.logit_scale)},
    "dbrx": lambda c: {
        "expert_count": c.ffn_config.moe_num_experts,
        "expert_used_count": c.ffn_config.moe_top_k,
        "attention.clamp_kqv": float(c.attn_config.clip_qkv),
    },
    "mamba": lambda c: {
        "ssm.conv_kernel": c.conv_kernel,
        "ssm.inner_size": c.intermediate_size,
        "ssm.state_size": c.state_size,
        "ssm.time_step_rank": c.time_step_rank,
    },
    "t5": t5,
}


# Tensors


def stored(kind: str, architecture: str, c: Any, tensors: Tensors) -> Tensors:
    """What is done to the tensors, and then their names."""
    changed: Tensors = {}
    for name, value in tensors.items():
        if not name.endswith((".attention.bias", ".masked_bias", "rotary_emb.inv_freq", ".embed_tokens.weight")) or (
            name == "model.embed_tokens.weight"
        ):
            changed |= CHANGES.get(kind, as_it_is)(name, value, c)
    changed = stacked_experts(changed)
    layers = field(c, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
    architectures = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], layers)
    found: Tensors = {}
    for name, value in changed.items():
        if architecture == "bloom":
            name = name.removeprefix("transformer.")
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, f"{name} has no name in llama.cpp"
        found[new] = value
    return found | extra(kind, c)


def extra(kind: str, c: Any) -> Tensors:
    parameters = getattr(c, "rope_parameters", None) or {}
    if kind == "phi3" and parameters.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(parameters[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if kind == "llama" and parameters.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, torch.device("cpu"))
        plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        return {"rope_freqs.weight": (plain / scaled).numpy()}
    return {}


def as_it_is(name: str, value: np.ndarray, c: Any) -> Tensors:
    return {name: value}


def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def rotary(name: str, value: np.ndarray, c: Any) -> Tensors:
    if ".q_proj." in name:
        return {name: interleaved(value, c.num_attention_heads)}
    if ".k_proj." in name:
        return {name: interleaved(value, c.num_key_value_heads)}
    return {name: value}


def baichuan(name: str, value: np.ndarray, c: Any) -> Tensors:
    if ".W_pack." not in name:
        return {name: value}
    parts = np.split(value, 3)
    turned = [interleaved(parts[0], c.num_attention_heads), interleaved(parts[1], c.num_attention_heads), parts[2]]
    return {name.replace("W_pack", f"{part}_proj"): one for part, one in zip("qkv", turned, strict=True)}


def plus_one(name: str, value: np.ndarray, c: Any) -> Tensors:
    return {name: value + 1 if name.endswith("norm.weight") else value}


def transposed(name: str, value: np.ndarray, c: Any) -> Tensors:
    swapped = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return {name: value.T if swapped else value}


def by_part(name: str, value: np.ndarray, c: Any) -> Tensors:
    if "query_key_value" not in name:
        return {name: value}
    heads = c.num_attention_heads
    pieces = value.reshape(heads, 3, c.hidden_size // heads, *value.shape[1:])
    return {name: np.concatenate([pieces[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])}


def falcon(name: str, value: np.ndarray, c: Any) -> Tensors:
    if "query_key_value" not in name:
        return {name: value}
    keys = key_heads("falcon", c, c.num_attention_heads)
    rest = value.shape[1:]
    pieces = value.reshape(keys, c.num_attention_heads // keys + 2, c.hidden_size // c.num_attention_heads, *rest)
    parts = (pieces[:, :-2], pieces[:, [-2]], pieces[:, [-1]])
    return {name: np.concatenate([part.reshape(-1, *rest) for part in parts])}


def dbrx(name: str, value: np.ndarray, c: Any) -> Tensors:
    if ".experts." not in name:
        return {name: value}
    experts = value.reshape(c.ffn_config.moe_num_experts, c.ffn_config.ffn_hidden_size, c.d_model)
    return {name + ".weight": experts.swapaxes(1, 2) if name.endswith("w2") else experts}


def mamba(name: str, value: np.ndarray, c: Any) -> Tensors:
    if name.endswith("A_log"):
        return {name: -np.exp(value)}
    return {name: value.squeeze(1) if name.endswith("conv1d.weight") else value}


def stacked_experts(tensors: Tensors) -> Tensors:
    """Mixtral's, Qwen's: one tensor per matrix with all experts of a layer, named as the converter names it."""
    found: Tensors = {}
    piles: dict[str, list[np.ndarray]] = {}
    for name, value in tensors.items():
        if ".mlp.experts." in name:
            before, _, after = name.partition(".mlp.experts.")
            piles.setdefault(f"{before}.mlp.experts.{after.split('.')[1]}.weight", []).append(value)
            continue
        if ".block_sparse_moe.experts." not in name:
            found[name] = value
            continue
        before, _, after = name.partition(".block_sparse_moe.experts.")
        piles.setdefault(
            f"layers.{before.split('.')[-1]}.feed_forward.experts.{after.split('.')[1]}.weight", []
        ).append(value)
    return found | {name: np.stack(pile) for name, pile in piles.items()}


CHANGES: dict[str, Callable[[str, np.ndarray, Any], Tensors]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), rotary),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), plus_one),
    "gpt2": transposed,
    **dict.fromkeys(("bloom", "gpt_neox"), by_part),
    "falcon": falcon,
    "dbrx": dbrx,
    "mamba": mamba,
    "baichuan": baichuan,
}
