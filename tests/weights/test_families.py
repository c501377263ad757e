"""Configs as the hub's files have them, family by family: what follows from fields that others do not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textmill.errors import ModelError
from textmill.weights.config import ModelConfig, read_config

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}


def read(folder: Path, **config: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


@pytest.mark.parametrize(
    ("length", "vocabulary", "alibi", "normed"),
    [
        ("max_position_embeddings", 64000, False, False),
        ("model_max_length", 64000, True, False),
        ("max_position_embeddings", 125696, False, True),
        ("model_max_length", 125696, True, True),
    ],
    ids=["7B", "13B", "2 7B", "2 13B"],
)
def test_baichuan(tmp_path: Path, length: str, vocabulary: int, alibi: bool, normed: bool) -> None:
    c = read(tmp_path, **(SIZES | {"model_type": "baichuan", "vocab_size": vocabulary, length: 4096}))
    assert (c.switch("alibi", False), c.switch("norm_head", False)) == (alibi, normed)
    assert c.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("fields", "kv_heads", "parallel"),
    [
        ({"multi_query": True, "num_kv_heads": 4, "parallel_attn": True}, 1, True),  # as transformers writes the 7B's
        ({"multi_query": False, "parallel_attn": False}, 4, False),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True, "parallel_attn": False}, 2, True),
        ({"new_decoder_architecture": True}, 4, True),
    ],
)
def test_falcon(tmp_path: Path, fields: dict[str, Any], kv_heads: int, parallel: bool) -> None:
    c = read(tmp_path, **SIZES, model_type="falcon", **fields)
    assert (c.kv_heads, c.switch("parallel_attn", True), c.hidden_act) == (kv_heads, parallel, "gelu")


@pytest.mark.parametrize(("model_type", "kv_heads"), [("RefinedWeb", 2), ("RefinedWebModel", 1)])
def test_falcon_under_its_old_names(tmp_path: Path, model_type: str, kv_heads: int) -> None:
    sizes = {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100, "n_head_kv": 2}
    c = read(tmp_path, **sizes, model_type=model_type, multi_query=model_type == "RefinedWebModel")
    assert (c.model_type, c.kv_heads, c.heads, c.norm_eps) == ("falcon", kv_heads, 4, 1e-5)


def test_santacoder_calls_itself_gpt2(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100, "n_positions": 128}
    c = read(tmp_path, **sizes, model_type="gpt2", attention_head_type="multiquery", activation_function="gelu_fast")
    assert (c.model_type, c.kv_heads, c.hidden_act) == ("santacoder", 1, "gelu_fast")
    assert read(tmp_path, **sizes, model_type="gpt2").model_type == "gpt2"


MPT = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 100, "max_seq_len": 65536}


def test_mpt(tmp_path: Path) -> None:
    attention = {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6, "attn_type": "multiquery_attention"}
    c = read(tmp_path, **MPT, attn_config=attention, expansion_ratio=2, logit_scale="inv_sqrt_d_model")
    assert (c.kv_heads, c.intermediate_size, c.max_position_embeddings) == (1, 128, 65536)
    assert (c.switch("alibi", False), c.real("alibi_bias_max"), c.real("clip_qkv")) == (True, 16.0, 6.0)
    assert c.real("logit_scale") == 0.125
    assert read(tmp_path, **MPT, attn_config={"kv_n_heads": 2}).kv_heads == 2
    assert read(tmp_path, **MPT, logit_scale=0.5).real("logit_scale") == 0.5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attn_config": {"rope": True}}, "rope"),
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm"),
        ({"norm_type": "rmsnorm"}, "norm_type"),
        ({"expansion_ratio": "many"}, "intermediate_size"),
    ],
)
def test_mpt_refuses_what_it_would_compute_wrongly(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read(tmp_path, **MPT, **fields)


@pytest.mark.parametrize("value", ["yes", 1, []])
def test_switches_are_yes_or_no(tmp_path: Path, value: Any) -> None:
    c = read(tmp_path, **SIZES, model_type="gpt_neox", use_parallel_residual=value)
    with pytest.raises(ModelError, match="use_parallel_residual"):
        c.switch("use_parallel_residual", True)
