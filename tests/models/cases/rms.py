"""Families with RMS norms and rotary positions, and Cohere; every kind of rope, each in a family that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.parity import Case, Oracle, load, logits_from, transformers_oracle
from tests.models.tiny import SIZES, Make, random_checkpoint, sized

EAGER = transformers_oracle("eager")  # sdpa leaves soft caps out
PAIRS = 8  # that turn, of heads of 16 numbers
SHORT = [1.0 + 0.05 * i for i in range(PAIRS)]
LONG = [1.5 + 0.4 * i for i in range(PAIRS)]


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0} | fields


def hub_style(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json as it lies on the hub: the base beside its scaling, which is called `rope_scaling`."""
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    return raw if scaling["type"] == "default" else raw | {"rope_scaling": scaling}


def phi3_hub_style(raw: dict[str, Any]) -> dict[str, Any]:
    """Phi-3's own files: what it was trained on stands outside."""
    raw = hub_style(raw)
    raw["original_max_position_embeddings"] = raw["rope_scaling"].pop("original_max_position_embeddings")
    return raw


def gemma3_hub_style(raw: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3 before transformers 5: every so many layers see everything, and a base for the others."""
    ropes = raw.pop("rope_parameters")
    raw.pop("layer_types")
    return raw | {
        "sliding_window_pattern": 3,
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": ropes["full_attention"]["factor"]},
        "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
    }


def always_long(folder: Path) -> Oracle:
    """Transformers with the long factors from the first token on, as a server of longer sequences has them."""
    model = load(folder)
    config, turning = model.config, model.model.rotary_emb
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=config.max_position_embeddings)
    turning.original_inv_freq.copy_(long)
    return logits_from(model)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
MSCALED = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4}
LONGROPE = rope("longrope", short_factor=SHORT, long_factor=LONG)

LLAMA = [
    Case("llama", "grouped", sized("llama", num_hidden_layers=3, rms_norm_eps=1e-3)),
    Case("llama", "multi-head", sized("llama", num_key_value_heads=4)),
    Case("llama", "one key head", sized("llama", num_key_value_heads=1)),
    Case("llama", "tied", sized("llama", tie_word_embeddings=True)),
    Case("llama", "biases", sized("llama", attention_bias=True, mlp_bias=True)),
    Case("llama", "own head_dim", sized("llama", head_dim=32)),
    Case("llama", "rope linear", sized("llama", rope_parameters=rope("linear", factor=2.0), rewrite=hub_style)),
    Case("llama", "rope dynamic", sized("llama", rope_parameters=rope("dynamic", factor=2.0))),
    Case("llama", "rope llama3", sized("llama", rope_parameters=LLAMA3)),
    Case("llama", "rope yarn", sized("llama", rope_parameters=YARN, rewrite=hub_style)),
    Case("llama", "rope yarn, own scales", sized("llama", rope_parameters=MSCALED)),
]
MISTRAL = [
    Case("mistral", "window", sized("mistral", sliding_window=24, rewrite=hub_style)),
    Case("mistral", "own head_dim", sized("mistral", sliding_window=None, head_dim=32)),
]
MOE = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
QWEN = [
    Case("qwen2", "biases", sized("qwen2", rewrite=hub_style)),
    Case("qwen2", "tied", sized("qwen2", tie_word_embeddings=True)),
    Case(
        "qwen2",
        "window on later layers",
        sized("qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    Case("qwen3", "norms of queries and keys", sized("qwen3", head_dim=32)),
    Case("qwen3_moe", "weights that sum to one", sized("qwen3_moe", norm_topk_prob=True, **MOE)),
    Case("qwen3_moe", "one layer without experts", sized("qwen3_moe", mlp_only_layers=[0], **MOE)),
    Case("qwen3", "tied", sized("qwen3", head_dim=16, tie_word_embeddings=True)),
]
PHI3 = [
    Case("phi3", "window", sized("phi3", sliding_window=24, pad_token_id=0)),
    Case(
        "phi3",
        "partial, tied",
        sized(
            "phi3",
            pad_token_id=0,
            rope_parameters=rope("default", partial_rotary_factor=0.75),
            tie_word_embeddings=True,
        ),
    ),
    Case(
        "phi3",
        "longrope, short",
        sized("phi3", pad_token_id=0, original_max_position_embeddings=512, rope_parameters=LONGROPE),
    ),
    Case(
        "phi3",
        "longrope, long",
        sized(
            "phi3",
            pad_token_id=0,
            original_max_position_embeddings=64,
            rope_parameters=LONGROPE,
            rewrite=phi3_hub_style,
        ),
        oracle=always_long,
    ),
]
GEMMA: dict[str, Any] = {"head_dim": 32, "embedding": 0.0125, "final": 30.0, "pad_token_id": 0}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 20,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    },
}


def gemma3_with_tower() -> Make:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7}
    sizes = SIZES | GEMMA3 | {"head_dim": 32, "pad_token_id": 0, "model_type": "gemma3_text"}
    return random_checkpoint(
        "gemma3",
        model_class=AutoModelForImageTextToText,
        embedding=0.0125,
        adjust=lambda model: model.model.language_model.norm.weight.mul_(30),
        text_config=sizes,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=159,
        boi_token_index=158,
        eoi_token_index=157,
    )


GEMMAS = [
    Case("gemma", "one key head", sized("gemma", num_key_value_heads=1, **GEMMA)),
    Case("gemma", "multi-head", sized("gemma", num_key_value_heads=4, **GEMMA)),
    Case(
        "gemma2",
        "caps and windows",
        sized("gemma2", num_hidden_layers=3, sliding_window=24, query_pre_attn_scalar=20, **CAPS, **GEMMA),
        oracle=EAGER,
    ),
    Case("gemma3_text", "two ropes", sized("gemma3_text", **GEMMA3, **GEMMA)),
    Case("gemma3", "its text", gemma3_with_tower(), transformers_oracle(model_class=AutoModelForImageTextToText)),
    Case("gemma3_text", "hub names", sized("gemma3_text", **GEMMA3, **GEMMA, rewrite=gemma3_hub_style)),
]
COHERE = [
    Case("cohere", "grouped", sized("cohere", logit_scale=0.5, tie_word_embeddings=True, final=4.0)),
    Case(
        "cohere",
        "norms of queries and keys",
        sized("cohere", logit_scale=0.5, use_qk_norm=True, tie_word_embeddings=True, final=4.0),
    ),
]

CASES = LLAMA + MISTRAL + QWEN + PHI3 + GEMMAS + COHERE
