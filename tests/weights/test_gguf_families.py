"""What GGUF metadata leaves unsaid about a family, and files whose tensors do not fit their metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import floats, gguf_bytes

from textmill.errors import ModelError
from textmill.weights.checkpoint import Checkpoint, open_checkpoint
from textmill.weights.config import ModelConfig, read_config

SIZES = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 16,
}
NUMBERS = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


def written(folder: Path, architecture: str, tensors: dict[str, Any], changes: dict[str, Any]) -> Path:
    keys = {f"{architecture}.{key}": value for key, value in (SIZES | changes).items() if value is not None}
    path = folder / "small.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": architecture} | keys, tensors))
    return path


def config(folder: Path, architecture: str, tensors: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return read_config(written(folder, architecture, tensors or {}, changes))


def checkpoint(folder: Path, architecture: str, tensors: dict[str, Any], **changes: Any) -> Checkpoint:
    return open_checkpoint(written(folder, architecture, tensors, changes))


def test_baichuan_is_told_apart_by_layers_and_vocabulary(tmp_path: Path) -> None:
    small = config(tmp_path, "baichuan", block_count=32)
    large = config(tmp_path, "baichuan", block_count=40)
    second = config(tmp_path, "baichuan", vocab_size=125696)
    assert [c.switch("alibi", False) for c in (small, large, second)] == [False, True, False]
    assert [c.switch("norm_head", False) for c in (small, large, second)] == [False, False, True]
    assert large.max_position_embeddings == 128


def test_the_largest_gemmas_scale_queries_by_another_width(tmp_path: Path) -> None:
    def scalar(architecture: str, layers: int) -> float | None:
        sizes = {"block_count": layers, "attention.key_length": 16, "attention.sliding_window": 8}
        return config(tmp_path, architecture, **sizes).real("query_pre_attn_scalar")

    assert (scalar("gemma2", 26), scalar("gemma2", 46)) == (16, 8)
    assert (scalar("gemma3", 34), scalar("gemma3", 62)) == (16, 8)


def test_windows_and_caps(tmp_path: Path) -> None:
    caps = config(tmp_path, "gemma2", attn_logit_softcapping=5.0)
    assert (caps.real("attn_logit_softcapping"), caps.real("final_logit_softcapping")) == (5.0, 30.0)
    listed = config(tmp_path, "gemma3", **{"attention.sliding_window_pattern": [True, False]})
    assert listed.layer_types == ("sliding_attention", "full_attention")
    every = config(tmp_path, "gemma3", **{"attention.sliding_window_pattern": 2})
    assert every.real("sliding_window_pattern") == 2
    with pytest.raises(ModelError, match=r"small\.gguf: gemma3\.attention\.sliding_window_pattern"):
        config(tmp_path, "gemma3", **{"attention.sliding_window_pattern": [True]})


def test_longrope_lies_in_tensors(tmp_path: Path) -> None:
    divisors = {f"rope_factors_{name}.weight": floats(np.full(4, value)) for name, value in (("long", 3), ("short", 2))}
    found = config(tmp_path, "phi3", divisors, **{"rope.scaling.original_context_length": 64})
    assert found.rope_scaling is not None
    assert (found.rope_scaling["rope_type"], found.rope_scaling["long_factor"]) == ("longrope", [3.0] * 4)
    assert found.rope_scaling["original_max_position_embeddings"] == 64
    assert checkpoint(tmp_path, "phi3", divisors).names() == []
    broken = divisors | {"rope_factors_long.weight": (1, (4,), bytes(8))}
    with pytest.raises(ModelError, match=r"small\.gguf: rope_factors_long\.weight"):
        config(tmp_path, "phi3", broken)


def test_a_model_without_attention_needs_no_heads(tmp_path: Path) -> None:
    sizes = {"ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 8, "ssm.time_step_rank": 2}
    heads = {"attention.head_count": 0, "attention.head_count_kv": 0, "feed_forward_length": 0}
    found = config(tmp_path, "mamba", **sizes, **heads)
    assert (found.model_type, found.raw["state_size"], found.raw["time_step_rank"]) == ("mamba", 8, 2)
    with pytest.raises(ModelError, match=r"small\.gguf: mamba\.ssm\.state_size"):
        config(tmp_path, "mamba", **(sizes | {"ssm.state_size": None}), **heads)


def test_one_of_ours_in_three_stored_ones(tmp_path: Path) -> None:
    parts = {f"blk.0.attn_{name}.weight": floats(NUMBERS[: 32 if name == "q" else 16]) for name in "qkv"}
    found = checkpoint(tmp_path, "baichuan", parts)
    name = "model.layers.0.self_attn.W_pack.weight"
    assert found.names() == [name]
    assert found.shape(name) == (64, 32)
    whole = found.tensor(name)
    # Each head of 8 rows was interleaved: row 1 of ours, the second of the first half, is row 2 there.
    assert [int(row[0]) // 32 for row in whole[[0, 1, 4, 32, 33, 48, 49]]] == [0, 2, 1, 0, 2, 0, 1]
    np.testing.assert_array_equal(found.tensor(name, np.array([49, 1])), whole[[49, 1]])
    np.testing.assert_array_equal(found.tensor(name, range(30, 34), range(3, 7)), whole[30:34, 3:7])
    del parts["blk.0.attn_k.weight"]
    with pytest.raises(ModelError, match=r"W_pack\.weight: its part attn_k is missing"):
        checkpoint(tmp_path, "baichuan", parts)


def test_one_stored_one_in_three_of_ours(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "phi2", {"blk.1.attn_qkv.weight": floats(NUMBERS)})
    assert [found.shape(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"] == [
        (32, 32),
        (16, 32),
        (16, 32),
    ]
    np.testing.assert_array_equal(found.tensor("model.layers.1.self_attn.v_proj.weight"), NUMBERS[48:])


@pytest.mark.parametrize(
    ("architecture", "tensors", "problem"),
    [
        ("bloom", {"blk.0.attn_qkv.weight": floats(NUMBERS[:60])}, "blk.0.attn_qkv.weight: 60 rows"),
        ("llama", {"blk.0.attn_k.weight": floats(NUMBERS[:14])}, "blk.0.attn_k.weight: 14 rows"),
        ("phi2", {"blk.0.attn_qkv.weight": floats(NUMBERS[:60])}, "blk.0.attn_qkv.weight: 60 rows"),
        ("llama", {"blk.0.ffn_up_exps.weight": floats(NUMBERS)}, "blk.0.ffn_up_exps.weight: .*experts"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, architecture: str, tensors: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ModelError, match=rf"small\.gguf: {problem}"):
        checkpoint(tmp_path, architecture, tensors, expert_count=2 if "exps" in problem else None)
