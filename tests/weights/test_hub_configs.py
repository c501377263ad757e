"""Configs as well-known checkpoints on the hub have them: what each means in our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textmill.layers.attention import window_of
from textmill.weights.config import ModelConfig, read_config


def sizes(hidden: int, heads: int, kv_heads: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden,
        "vocab_size": 32064,
        "rms_norm_eps": 1e-5,
    } | more


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LISTS = {"long_factor": [1.1] * 48, "short_factor": [1.0] * 48}
LONG = LISTS | {"type": "longrope"}
PHI3 = {"model_type": "phi3", "hidden_act": "silu", "rope_theta": 10000.0, "original_max_position_embeddings": 4096}

HUB: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1 8B": (
        sizes(4096, 32, 8, 32, model_type="llama", rope_theta=500000.0, rope_scaling=LLAMA3, pretraining_tp=1)
        | {"max_position_embeddings": 131072, "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16"},
        {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": LLAMA3, "eos_token_ids": (128001, 128008, 128009)},
    ),
    "Mistral 7B 0.1": (
        sizes(4096, 32, 8, 32, model_type="mistral", rope_theta=10000.0, sliding_window=4096),
        {"sliding_window": 4096, "rope_scaling": None},
    ),
    "Mistral 7B 0.3": (
        sizes(4096, 32, 8, 32, model_type="mistral", rope_theta=1e6, sliding_window=None, head_dim=None),
        {"sliding_window": None, "head_dim": 128, "rope_theta": 1e6},
    ),
    "Mistral Nemo": (
        sizes(5120, 32, 8, 40, model_type="mistral", rope_theta=1e6, sliding_window=None, head_dim=128),
        {"head_dim": 128, "rotary_dim": 128},
    ),
    "Qwen 2.5 7B": (
        sizes(3584, 28, 4, 28, model_type="qwen2", sliding_window=131072, use_sliding_window=False)
        | {"max_window_layers": 28, "rope_theta": 1e6, "tie_word_embeddings": False},
        {"sliding_window": None, "head_dim": 128, "tie_word_embeddings": False},
    ),
    "Qwen 1.5 0.5B": (
        sizes(1024, 16, 16, 24, model_type="qwen2", sliding_window=32768, max_window_layers=21),
        {"sliding_window": None},
    ),
    "Qwen 3 8B": (
        sizes(4096, 32, 8, 36, model_type="qwen3", head_dim=128, sliding_window=None, use_sliding_window=False),
        {"head_dim": 128, "sliding_window": None},
    ),
    "Phi 3 mini 4k": (
        sizes(3072, 32, 32, 32, **PHI3, sliding_window=2047, rope_scaling=None, max_position_embeddings=4096),
        {"sliding_window": 2047, "rope_scaling": None, "head_dim": 96, "context": 4096},
    ),
    "Phi 3 mini 128k": (
        sizes(3072, 32, 32, 32, **PHI3, sliding_window=262144, rope_scaling=LONG, max_position_embeddings=131072),
        {
            "rope_scaling": LISTS | {"rope_type": "longrope", "original_max_position_embeddings": 4096},
            "longest": 131072,
        },
    ),
    "Phi 4 mini": (
        sizes(3072, 24, 8, 32, **PHI3, rope_scaling=LONG, partial_rotary_factor=0.75, tie_word_embeddings=True),
        {"head_dim": 128, "rotary_dim": 96, "tie_word_embeddings": True},
    ),
    "Gemma 2B": (
        sizes(2048, 8, 1, 18, model_type="gemma", head_dim=256, hidden_act="gelu", max_position_embeddings=8192),
        {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "kv_heads": 1},
    ),
    "Gemma 2 9B": (
        sizes(3584, 16, 8, 42, model_type="gemma2", head_dim=256, hidden_activation="gelu_pytorch_tanh")
        | {"sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0},
        {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096, "layer_types": ()},
    ),
    "Gemma 3 1B": (
        sizes(1152, 4, 1, 26, model_type="gemma3_text", head_dim=256, hidden_activation="gelu_pytorch_tanh")
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 32768},
        {"rope_theta": 1e6, "rope_local_theta": 1e4, "rope_scaling": None, "sliding_window": 512},
    ),
    "Gemma 3 4B": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"model_type": "siglip_vision_model"},
        },
        {"heads": 8, "kv_heads": 4, "head_dim": 256, "rope_theta": 1e6, "vocab_size": 262208, "num_layers": 34}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131072},
    ),
    "Command R": (
        sizes(8192, 64, 64, 40, model_type="cohere", layer_norm_eps=1e-5, logit_scale=0.0625, rope_theta=8e6)
        | {"model_max_length": 131072, "max_position_embeddings": 131072, "use_qk_norm": False},
        {"head_dim": 128, "rope_theta": 8e6, "max_position_embeddings": 131072},
    ),
}


def config(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub(tmp_path: Path, name: str) -> None:
    raw, expected = HUB[name]
    c = config(tmp_path, raw)
    scaling = expected.get("rope_scaling")
    if scaling:
        assert c.rope_scaling is not None
        assert c.rope_scaling | scaling == c.rope_scaling  # whatever else it says
    found = {field: getattr(c, field) for field in expected if field != "rope_scaling" or not scaling}
    assert found == {field: expected[field] for field in found}


def test_which_layers_have_a_window(tmp_path: Path) -> None:
    c = config(tmp_path, HUB["Gemma 2 9B"][0] | {"num_hidden_layers": 4})
    assert [window_of(c, layer, slides=layer % 2 == 0) for layer in range(4)] == [4096, 0, 4096, 0]
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    c = config(tmp_path, HUB["Gemma 2 9B"][0] | {"num_hidden_layers": 4, "layer_types": types})
    assert [window_of(c, layer, slides=layer % 2 == 0) for layer in range(4)] == [0, 4096, 0, 0]
