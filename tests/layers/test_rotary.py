"""Rotary tables against the frequencies that transformers computes, on both sides of every trained length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from textmill.errors import ModelError
from textmill.layers.rotary import Rope
from textmill.weights.config import ModelConfig, read_config

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 8.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn with scales": YARN | {"mscale": 0.8, "mscale_all_dim": 0.3, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn with a factor on attention": YARN | {"attention_factor": 1.3, "truncate": False},
    "longrope": LONGROPE,
    "longrope with a factor on attention": LONGROPE | {"attention_factor": 1.3},
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


def written(folder: Path, config: Any) -> ModelConfig:
    config.save_pretrained(folder)
    return read_config(folder)


def expected(config: Any, kind: str, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of transformers' frequencies for a sequence of `longest` tokens."""
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=longest)
    angles = torch.outer(torch.arange(longest).float(), frequencies)
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()


@pytest.mark.parametrize("longest", [100, 128, 129, 400])
@pytest.mark.parametrize("name", KINDS)
def test_tables_are_those_of_the_longest_sequence_served(tmp_path: Path, name: str, longest: int) -> None:
    scaling = KINDS[name] | {"rope_theta": 5000.0}
    sizes: dict[str, Any] = SIZES | {"max_position_embeddings": 512}
    if name.startswith("longrope"):
        config = Phi3Config(**sizes, original_max_position_embeddings=128, rope_parameters=scaling, pad_token_id=0)
    else:
        config = LlamaConfig(**(sizes | {"max_position_embeddings": 128}), head_dim=64, rope_parameters=scaling)
    c = replace(written(tmp_path, config), max_total_tokens=longest)
    rope = Rope(c)
    cos, sin = expected(config, scaling["rope_type"], longest)
    np.testing.assert_allclose(rope.cos, cos, atol=5e-5)
    np.testing.assert_allclose(rope.sin, sin, atol=5e-5)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        (YARN, 256),
        (YARN | {"factor": 1.5}, 128),
        ({"rope_type": "linear", "factor": 4.0}, 128),
    ],
)
def test_some_ropes_serve_more_than_the_config_says(tmp_path: Path, scaling: dict[str, Any], context: int) -> None:
    config = LlamaConfig(**SIZES, max_position_embeddings=128, rope_parameters=scaling | {"rope_theta": 1e4})
    assert written(tmp_path, config).context == context


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_first_names_of_longrope(tmp_path: Path, kind: str) -> None:
    scaling = LONGROPE | {"rope_theta": 1e4}
    config = Phi3Config(**SIZES, original_max_position_embeddings=128, rope_parameters=scaling, pad_token_id=0)
    c = written(tmp_path, config)
    assert c.rope_scaling is not None
    renamed = replace(c, rope_scaling=c.rope_scaling | {"rope_type": kind})
    np.testing.assert_array_equal(Rope(renamed).cos, Rope(c).cos)


def test_dynamic_rope_is_plain_up_to_the_trained_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    c = written(tmp_path, LlamaConfig(**SIZES, max_position_embeddings=128, rope_parameters=scaling))
    np.testing.assert_array_equal(Rope(c).cos, Rope(c, stretched=False).cos)
    assert len(Rope(replace(c, max_total_tokens=300)).cos) == 300


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "spiral"}, "'spiral'"),
        ({"rope_type": "linear"}, "rope_scaling.factor"),
        ({"rope_type": "linear", "factor": "big"}, "rope_scaling.factor"),
        (
            {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0, 1.0, 1.0, 1.0]},
            "rope_scaling.long_fac",
        ),
        ({"rope_type": "longrope", "long_factor": [1.0, 1.0, 0.0, 1.0]}, "rope_scaling.long_fac"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_named(tmp_path: Path, scaling: dict[str, Any], named: str) -> None:
    c = written(tmp_path, LlamaConfig(**SIZES, max_position_embeddings=128))
    scaling = scaling | {"original_max_position_embeddings": 64}
    with pytest.raises(ModelError, match=named):
        Rope(replace(c, rope_scaling=scaling))
