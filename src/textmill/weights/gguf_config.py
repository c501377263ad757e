"""GGUF metadata as the config.json that the same model has as a Hugging Face checkpoint, and so as a ModelConfig.

What the metadata leaves out (llama.cpp's graphs know it) is said by a function per architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from textmill.errors import ModelError
from textmill.weights.config import Fields, ModelConfig, config_of
from textmill.weights.families import in_known_names
from textmill.weights.gguf import GgufFile
from textmill.weights.gguf_names import Family, family_of

Raw = dict[str, Any]
_F32 = 0
ALIBI_LAYERS = 40  # of the one family whose larger model has ALiBi


class Metadata(Fields):
    """The keys of the file's architecture (`llama.embedding_length` and so on)."""

    def __init__(self, file: GgufFile, family: Family) -> None:
        super().__init__(file.metadata, file.path, prefix=f"{family.architecture}.")
        self.file = file
        self.family = family

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def positive(self, name: str) -> float | None:
        """A real number; 0 says that there is none."""
        _, value = self.find((name,))
        return self.real(name, default=1.0) if value else None

    def floats(self, tensor: str) -> list[float] | None:
        """A small tensor of float32 that is a setting."""
        found = self.file.tensors.get(tensor)
        if found is None:
            return None
        if found.ggml_type != _F32 or len(found.shape) != 1:
            raise ModelError(f"{self.path}: {tensor}: is no list of float32")
        return [float(value) for value in self.file.data(tensor).view("<f4")]


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The config of a file whose architecture `gguf_names` knows."""
    family = family_of(file)
    m = Metadata(file, family)
    raw = common(m)
    extra = EXTRAS.get(family.model_type)
    raw |= {} if extra is None else extra(m, raw)
    config = config_of(in_known_names(raw), file.path, gguf_eos_ids(file))
    turned = m.optional_number("rope.dimension_count")
    return replace(config, rotary_dim=turned) if turned else config


def common(m: Metadata) -> Raw:
    """What all architectures say, under the names that most config.json files use."""
    hidden = m.number("embedding_length")
    raw: Raw = {
        "model_type": m.family.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": m.number("block_count"),
        "num_attention_heads": m.optional_number("attention.head_count") or None,
        "num_key_value_heads": m.optional_number("attention.head_count_kv") or None,
        "head_dim": m.optional_number("attention.key_length") or None,
        "intermediate_size": m.optional_number("feed_forward_length") or None,
        "rms_norm_eps": m.real("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", default=1e-5),
        "rope_theta": m.real("rope.freq_base", default=10000.0),
        "rope_scaling": rope_scaling(m),
        "max_position_embeddings": m.number("context_length"),
        "vocab_size": vocabulary(m),
        "tie_word_embeddings": not m.has("output.weight"),
        "sliding_window": m.optional_number("attention.sliding_window") or None,
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "bos_token_id": token_id(m.file, "tokenizer.ggml.bos_token_id"),
    }
    return {name: value for name, value in raw.items() if value is not None}


def vocabulary(m: Metadata) -> int:
    """Rows of the token table; what the metadata says where a file has none."""
    table = m.file.tensors.get("token_embd.weight")
    if table is not None:
        return table.shape[0]
    tokens = m.file.metadata.get("tokenizer.ggml.tokens")
    return m.number("vocab_size", default=len(tokens) if isinstance(tokens, list) and tokens else None)


def rope_scaling(m: Metadata) -> Raw | None:
    kind = m.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    scaling: Raw = {"rope_type": kind, "factor": m.real("rope.scaling.factor", default=1.0)}
    original = m.optional_number("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling


def mixtral(m: Metadata, raw: Raw) -> Raw:
    return {
        "num_local_experts": m.number("expert_count"),
        "num_experts_per_tok": m.number("expert_used_count", default=2),
    }


def qwen3_moe(m: Metadata, raw: Raw) -> Raw:
    """That the chosen experts' weights sum to one is in llama.cpp's code, not in the file."""
    counts = {"num_experts": m.number("expert_count"), "num_experts_per_tok": m.number("expert_used_count", default=8)}
    return counts | {"norm_topk_prob": True}


def phi3(m: Metadata, raw: Raw) -> Raw:
    """The divisors of longrope are tensors here, and its attention factor is worked out already."""
    long, short = m.floats("rope_factors_long.weight"), m.floats("rope_factors_short.weight")
    if long is None or short is None:
        return {}
    scaling: Raw = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    factor, original = m.positive("rope.scaling.attn_factor"), m.optional_number("rope.scaling.original_context_length")
    if factor is not None:
        scaling["attention_factor"] = factor
    if original:
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


def windows(m: Metadata, raw: Raw) -> Raw:
    """Which layers have a window, where the file says it: every one but each n-th, or a list of yes and no."""
    name, value = m.find(("attention.sliding_window_pattern",))
    if not isinstance(value, list):
        every = m.optional_number("attention.sliding_window_pattern")
        return {"sliding_window_pattern": every} if every else {}
    if len(value) != raw["num_hidden_layers"]:
        raise m.fail(name, value, f"a list of {raw['num_hidden_layers']} switches")
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in value]}


def gemma(m: Metadata, raw: Raw) -> Raw:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def scalar_of(m: Metadata, raw: Raw, layers: int) -> Raw:
    """The largest model, known by its number of layers, scales queries by another width than that of its heads."""
    scale = m.positive("attention.scale")
    if scale is not None:
        return {"query_pre_attn_scalar": scale**-2}
    by_width = raw["num_hidden_layers"] == layers
    width = raw["hidden_size"] // raw["num_attention_heads"] if by_width else raw.get("head_dim")
    return {} if width is None else {"query_pre_attn_scalar": width}


def gemma2(m: Metadata, raw: Raw) -> Raw:
    caps = {
        "attn_logit_softcapping": m.positive("attn_logit_softcapping") or 50.0,
        "final_logit_softcapping": m.positive("final_logit_softcapping") or 30.0,
    }
    return gemma(m, raw) | windows(m, raw) | scalar_of(m, raw, 46) | caps


def gemma3(m: Metadata, raw: Raw) -> Raw:
    local = {"rope_local_base_freq": m.real("rope.freq_base_swa", default=10000.0)}
    cap = m.positive("final_logit_softcapping")
    own = gemma(m, raw) | windows(m, raw) | scalar_of(m, raw, 62) | local
    return own if cap is None else own | {"final_logit_softcapping": cap}


def gpt_bigcode(m: Metadata, raw: Raw) -> Raw:
    return {"multi_query": raw.get("num_key_value_heads") == 1}


def gpt_neox(m: Metadata, raw: Raw) -> Raw:
    parallel = m.switch("use_parallel_residual")
    return {"use_parallel_residual": parallel is not False}


def falcon(m: Metadata, raw: Raw) -> Raw:
    """Every model is run as the new decoder is: attention beside the MLP, one key head per group of queries."""
    return {"new_decoder_architecture": True, "num_kv_heads": raw.get("num_key_value_heads", 1)}


def bloom(m: Metadata, raw: Raw) -> Raw:
    return {"seq_length": raw["max_position_embeddings"]}


def mpt(m: Metadata, raw: Raw) -> Raw:
    bias = m.positive("attention.max_alibi_bias")
    attention = {
        "alibi": bias is not None,
        "alibi_bias_max": bias,
        "clip_qkv": m.positive("attention.clamp_kqv"),
        "qk_ln": m.has("blk.0.attn_q_norm.weight"),
        "kv_n_heads": raw.get("num_key_value_heads"),
    }
    return {
        "attn_config": attention,
        "d_model": raw["hidden_size"],
        "expansion_ratio": m.number("feed_forward_length", default=4 * raw["hidden_size"]) / raw["hidden_size"],
        "max_seq_len": raw["max_position_embeddings"],
        "learned_pos_emb": m.has("position_embd.weight"),
    }


def cohere(m: Metadata, raw: Raw) -> Raw:
    return {"logit_scale": m.real("logit_scale", default=1.0), "use_qk_norm": m.has("blk.0.attn_q_norm.weight")}


def dbrx(m: Metadata, raw: Raw) -> Raw:
    attention = {
        "clip_qkv": m.positive("attention.clamp_kqv"),
        "kv_n_heads": raw.get("num_key_value_heads"),
        "rope_theta": raw["rope_theta"],
    }
    experts = {
        "moe_num_experts": m.number("expert_count"),
        "moe_top_k": m.number("expert_used_count"),
        "ffn_hidden_size": m.number("feed_forward_length"),
        "moe_normalize_expert_weights": 1.0,
    }
    return {"attn_config": attention, "ffn_config": experts, "d_model": raw["hidden_size"]}


def mamba(m: Metadata, raw: Raw) -> Raw:
    return {
        "conv_kernel": m.number("ssm.conv_kernel"),
        "intermediate_size": m.number("ssm.inner_size"),
        "state_size": m.number("ssm.state_size"),
        "time_step_rank": m.number("ssm.time_step_rank"),
    }


def t5(m: Metadata, raw: Raw) -> Raw:
    layers, heads = raw["num_hidden_layers"], m.number("attention.head_count")
    return {
        "num_layers": layers,
        "num_decoder_layers": m.number("decoder_block_count", default=layers),
        "num_heads": heads,
        "d_kv": m.number("attention.key_length", default=raw["hidden_size"] // heads),
        "d_ff": m.number("feed_forward_length"),
        "feed_forward_proj": "gated-gelu" if m.has("enc.blk.0.ffn_gate.weight") else "relu",
        "relative_attention_num_buckets": m.number("attention.relative_buckets_count", default=32),
        "decoder_start_token_id": m.optional_number("decoder_start_token_id") or 0,
    }


def baichuan(m: Metadata, raw: Raw) -> Raw:
    """llama.cpp, too, knows by the number of layers which has rotary positions (7B) and which ALiBi (13B)."""
    if raw["num_hidden_layers"] != ALIBI_LAYERS:
        return {}
    return {"model_max_length": raw.pop("max_position_embeddings")}


EXTRAS: dict[str, Callable[[Metadata, Raw], Raw]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "phi3": phi3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neox": gpt_neox,
    "falcon": falcon,
    "bloom": bloom,
    "mpt": mpt,
    "cohere": cohere,
    "dbrx": dbrx,
    "mamba": mamba,
    "t5": t5,
    "baichuan": baichuan,
}


def gguf_eos_ids(file: GgufFile) -> tuple[int, ...]:
    """The ids that end a generation: end of sequence, and end of turn and of message where the file names them."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [token_id(file, f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(number for number in found if number is not None))


def token_id(file: GgufFile, key: str) -> int | None:
    return Fields(file.metadata, file.path).optional_number(key)
