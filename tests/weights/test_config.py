"""Configs of either style and of GGUF files give the same names; wrong fields are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textmill.errors import ModelError
from textmill.weights.config import read_config

HUB: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "max_position_embeddings": 512,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def folder_with(tmp_path: Path, config: object, generation: object = None) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def test_hub_style(tmp_path: Path) -> None:
    config = read_config(folder_with(tmp_path, HUB))
    assert (config.heads, config.kv_heads, config.head_dim, config.rotary_dim) == (4, 2, 16, 16)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, {"rope_type": "linear", "factor": 2.0})
    assert (config.torch_dtype, config.tie_word_embeddings) == ("bfloat16", False)
    assert config.eos_token_ids == (2,)
    assert config.sliding_window is None
    assert config.raw["hidden_size"] == 64


def test_transformers_5_style_means_the_same(tmp_path: Path) -> None:
    old = read_config(folder_with(tmp_path, HUB))
    new: dict[str, Any] = {key: item for key, item in HUB.items() if not key.startswith(("rope", "torch"))}
    new |= {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
        "dtype": "bfloat16",
    }
    config = read_config(folder_with(tmp_path, new))
    assert config.rope_theta == old.rope_theta
    assert config.rope_scaling is not None
    assert old.rope_scaling is not None
    assert config.rope_scaling | {"rope_theta": 0} == old.rope_scaling | {"rope_theta": 0}
    assert config.torch_dtype == old.torch_dtype


def test_a_default_rope_is_no_scaling(tmp_path: Path) -> None:
    parameters = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}}
    config = read_config(folder_with(tmp_path, {**HUB, "rope_scaling": None, "rope_theta": None} | parameters))
    assert (config.rope_scaling, config.rope_theta, config.rotary_dim) == (None, 7.0, 8)


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    assert read_config(folder_with(tmp_path, HUB, {"eos_token_id": [7, 2, 7]})).eos_token_ids == (7, 2)


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    windowed = {**HUB, "sliding_window": 16}
    assert read_config(folder_with(tmp_path, windowed)).sliding_window == 16
    assert read_config(folder_with(tmp_path, {**windowed, "use_sliding_window": False})).sliding_window is None


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("vocab_size", 2**40),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "x"),
        ("rope_theta", 0),
        ("rope_scaling", [1]),
        ("model_type", 3),
        ("tie_word_embeddings", 1),
        ("eos_token_id", [1, "2"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, wrong: object) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {field}"):
        read_config(folder_with(tmp_path, {**HUB, field: wrong}))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_the_default_models_metadata(default_model: Path) -> None:
    config = read_config(default_model)
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_layers, config.intermediate_size) == (576, 30, 1536)
    assert (config.heads, config.kv_heads, config.head_dim, config.rotary_dim) == (9, 3, 64, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert (config.rope_theta, config.rope_scaling) == (100000.0, None)
    assert config.norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings is True
    assert config.eos_token_ids == (2,)
