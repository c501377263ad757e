"""What single families' configs call differently, nest or leave to their code, put into the names that others use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textmill.errors import ModelError

Raw = dict[str, Any]


def in_known_names(raw: Raw) -> Raw:
    """A config.json with its family's defaults filled in and its oddities spelled as others spell them."""
    family = raw.get("model_type", "mamba" if "ssm_cfg" in raw else None)
    if not isinstance(family, str):
        return raw
    defaults = DEFAULTS.get(family, {})
    full = defaults | {name: value for name, value in raw.items() if value is not None}
    rewrite = REWRITES.get(family)
    return full if rewrite is None else full | rewrite(full)


# Under the names that the family itself uses.
DEFAULTS: dict[str, Raw] = {
    "gpt2": {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "gpt_bigcode": {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    "gpt_neox": {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "attention_bias": True},
    "phi": {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
    "starcoder2": {
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
        "use_bias": True,
    },
    "falcon": {"layer_norm_epsilon": 1e-5, "activation": "gelu", "multi_query": True},
    "bloom": {"layer_norm_epsilon": 1e-5},
    "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "mpt": {"layer_norm_epsilon": 1e-5},
    "opt": {"activation_function": "relu"},
    "qwen2": {"use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8},
    "qwen3": {"use_sliding_window": False, "head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    "gemma": {"head_dim": 256, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 8192},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 131072},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "max_position_embeddings": 8192},
    "t5": {"feed_forward_proj": "relu", "num_layers": 6, "num_heads": 8, "d_kv": 64, "d_ff": 2048},
    "mamba": {"layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 1},
}
DEFAULTS["RefinedWeb"] = DEFAULTS["RefinedWebModel"] = DEFAULTS["falcon"]


def _gpt2(raw: Raw) -> Raw:
    """SantaCoder's own code calls itself GPT-2."""
    multi_query = raw.get("attention_head_type") == "multiquery"
    return {"model_type": "santacoder", "num_key_value_heads": 1} if multi_query else {}


def _gpt_bigcode(raw: Raw) -> Raw:
    return {"num_key_value_heads": 1 if raw["multi_query"] else raw.get("n_head", raw.get("num_attention_heads"))}


def _falcon(raw: Raw) -> Raw:
    """Old files: RefinedWeb is the new decoder, RefinedWebModel the old one; both count heads as GPT-2 does.

    `num_kv_heads` is the number of all heads even where they share one.
    """
    new = raw.get("new_decoder_architecture", raw["model_type"] == "RefinedWeb")
    heads = raw.get("num_attention_heads", raw.get("n_head"))
    grouped = raw.get("num_kv_heads", raw.get("n_head_kv", heads))
    return {
        "model_type": "falcon",
        "num_key_value_heads": grouped if new else 1 if raw["multi_query"] else heads,
        "parallel_attn": True if new else raw.get("parallel_attn", True),
        "hidden_act": raw["activation"],
        "intermediate_size": raw.get("ffn_hidden_size"),
        "hidden_size": raw.get("hidden_size", raw.get("n_embed")),
    }


def _bloom(raw: Raw) -> Raw:
    return {
        "hidden_act": "gelu_tanh",
        "hidden_size": raw.get("hidden_size", raw.get("n_embed")),
        "max_position_embeddings": raw.get("seq_length"),  # what it was trained on; ALiBi knows no end
    }


def _mpt(raw: Raw) -> Raw:
    """What the code reads of `attn_config` stands beside the rest, under the same names."""
    attention = raw.get("attn_config")
    attention = attention if isinstance(attention, dict) else {}
    single = attention.get("attn_type") == "multiquery_attention"
    ratio, width, scale = raw.get("expansion_ratio", 4), raw.get("d_model"), raw.get("logit_scale")
    for name in ("rope", "prefix_lm"):
        if attention.get(name):
            raise ModelError(f"config.json: attn_config.{name}: MPT models with this are not supported")
    if "layernorm" not in str(raw.get("norm_type", "layernorm")):
        raise ModelError(f"config.json: norm_type: {raw['norm_type']!r} is not supported for MPT models")
    if not isinstance(width, int) or not isinstance(ratio, int | float):
        return {"intermediate_size": ratio}  # not a size: the reader says so
    names = ("alibi", "alibi_bias_max", "clip_qkv", "qk_ln", "softmax_scale")
    return {name: attention.get(name) for name in names} | {
        "hidden_act": "gelu",
        "intermediate_size": int(ratio * width),
        "num_key_value_heads": 1 if single else attention.get("kv_n_heads"),
        "max_position_embeddings": raw.get("max_seq_len"),
        "logit_scale": float(width) ** -0.5 if scale == "inv_sqrt_d_model" else scale,
    }


def _mamba(raw: Raw) -> Raw:
    """The authors' own files name no model_type, and count the vocabulary without the rows that fill the table up."""
    size, multiple = raw.get("vocab_size"), raw.get("pad_vocab_size_multiple", 1)
    if isinstance(size, int) and isinstance(multiple, int) and multiple > 0:
        size = -(-size // multiple) * multiple
    return {"model_type": "mamba", "endless": True, "vocab_size": size}


def _dbrx(raw: Raw) -> Raw:
    """What stands in `attn_config` and `ffn_config` stands beside the rest, as others call it."""
    attention, feed = (
        found if isinstance(found := raw.get(name), dict) else {} for name in ("attn_config", "ffn_config")
    )
    norm, activation = feed.get("moe_normalize_expert_weights", 1.0), feed.get("ffn_act_fn")
    return {
        "clip_qkv": attention.get("clip_qkv"),
        "num_key_value_heads": attention.get("kv_n_heads"),
        "rope_theta": attention.get("rope_theta", 10000.0),
        "max_position_embeddings": raw.get("max_seq_len", raw.get("max_position_embeddings")),
        "layer_norm_eps": 1e-5,
        "intermediate_size": feed.get("ffn_hidden_size"),
        "hidden_act": activation.get("name", "silu") if isinstance(activation, dict) else "silu",
        "num_local_experts": feed.get("moe_num_experts"),
        "num_experts_per_tok": feed.get("moe_top_k"),
        "moe_normalize_expert_weights": norm,
        "plain_expert_weights": norm is None,
    }


def _t5(raw: Raw) -> Raw:
    """Distances know no end, whatever `n_positions` says. Whose head is the embedding scales what goes in."""
    kind = raw["feed_forward_proj"]
    start = raw.get("decoder_start_token_id", raw.get("pad_token_id", 0))
    return {
        "num_hidden_layers": raw.get("num_decoder_layers", raw["num_layers"]),
        "num_attention_heads": raw.get("num_heads"),
        "head_dim": raw["d_kv"],
        "intermediate_size": raw.get("d_ff"),
        "max_position_embeddings": 2048,
        "endless": True,
        "hidden_act": "gelu_new" if kind == "gated-gelu" else str(kind).removeprefix("gated-"),
        "scale_decoder_outputs": raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)),
        "decoder_start_token_id": start,
    }


def _opt(_: Raw) -> Raw:
    return {"layer_norm_eps": 1e-5}


def _partly_rotary(share: float) -> Callable[[Raw], Raw]:
    """Families whose code rotates only a part of each head where the config does not say how much."""

    def rewrite(raw: Raw) -> Raw:
        rope = raw.get("rope_parameters")
        places = (raw, rope if isinstance(rope, dict) else {})
        said = any(name in place for place in places for name in ("partial_rotary_factor", "rotary_pct"))
        return {} if said else {"partial_rotary_factor": share}

    return rewrite


def _gemma(raw: Raw) -> Raw:
    """Its first files say "gelu" and mean the approximation."""
    return {"hidden_act": "gelu_pytorch_tanh"} if raw["hidden_act"] == "gelu" else {}


def _gemma2(raw: Raw) -> Raw:
    return {"hidden_act": raw.get("hidden_activation", "gelu_pytorch_tanh")}


def _gemma3(raw: Raw) -> Raw:
    theta = {} if "rope_parameters" in raw else {"rope_theta": raw.get("rope_theta", 1e6)}
    return _gemma2(raw) | theta


def _baichuan(raw: Raw) -> Raw:
    """Nothing but the field's name tells rotary positions (7B) from ALiBi (13B); the vocabulary tells 2 from 1."""
    length = raw.get("max_position_embeddings")
    return {
        "model_type": "baichuan",
        "alibi": length is None,
        "norm_head": raw.get("norm_head", raw.get("vocab_size") == 125696),
        "max_position_embeddings": raw.get("model_max_length") if length is None else length,
    }


# Of text models inside larger ones, whose files leave out what is as in transformers' config classes.
INNER: dict[str, Raw] = {
    "gemma3_text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "vocab_size": 262208,
    },
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
INNER_SIZES: Raw = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
}


def _with_text_config(raw: Raw) -> Raw:
    """The fields of the text model inside stand beside the rest; `text_config` holds them in full."""
    inner = raw.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    kind = inner.get("model_type")
    known = INNER.get(kind) if isinstance(kind, str) else None
    inner = in_known_names(inner if known is None else INNER_SIZES | known | inner)
    return inner | {"model_type": raw["model_type"], "text_config": inner}


def _idefics(raw: Raw) -> Raw:
    """Tokens that were added later have tables of their own, but count like the others."""
    sizes = raw.get("vocab_size"), raw.get("additional_vocab_size", 0)
    return {"vocab_size": sum(sizes) if all(type(size) is int for size in sizes) else sizes[0]}


REWRITES: dict[str, Callable[[Raw], Raw]] = {
    "idefics": _idefics,
    "gemma3": _with_text_config,
    "llava_next": _with_text_config,
    "idefics2": _with_text_config,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _partly_rotary(0.25),
    "phi": _partly_rotary(0.5),
    "falcon": _falcon,
    "RefinedWeb": _falcon,
    "RefinedWebModel": _falcon,
    "bloom": _bloom,
    "mpt": _mpt,
    "dbrx": _dbrx,
    "opt": _opt,
    "t5": _t5,
    "mamba": _mamba,
    "baichuan": _baichuan,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
