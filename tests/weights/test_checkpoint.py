"""A checkpoint is the same mapping whatever it lies in: safetensors, index, GGUF; read lazily, names checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import floats, gguf_bytes
from safetensors.torch import load_file, save_file

from textmill.errors import ModelError
from textmill.quant.packed import Packed
from textmill.weights.checkpoint import open_checkpoint

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 16,
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a projection's rows, from transformers' half-split order."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def small_gguf(folder: Path, tensors: dict[str, Any], **metadata: Any) -> Path:
    path = folder / "small.gguf"
    path.write_bytes(gguf_bytes(LLAMA | metadata, tensors))
    return path


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.matrix(name)


def test_safetensors_are_read_as_they_were_saved(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    saved = load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == sorted(saved)
    assert not checkpoint.packed
    for name, tensor in saved.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(torch.as_tensor(checkpoint.tensor(name)), tensor)
    assert checkpoint.unread() == []


def test_an_index_and_sixteen_bits(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    saved = load_file(tiny_llama() / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in saved.items()}
    names = sorted(half)
    files = {"model-00001.safetensors": names[::2], "model-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: half[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    for name in names:
        assert checkpoint.tensor(name).dtype == torch.float32
        assert torch.equal(checkpoint.tensor(name), half[name].float())


def test_views_and_what_nobody_read(tiny_llama: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_llama())
    q = checkpoint.root / "model" / "layers" / 0 / "self_attn" / "q_proj"
    assert q.has("weight")
    assert not q.has("bias")
    assert q.shape("weight") == (64, 64)
    np.testing.assert_array_equal(q.tensor("weight"), checkpoint.tensor("model.layers.0.self_attn.q_proj.weight"))
    unread = checkpoint.unread()
    assert "model.layers.0.self_attn.q_proj.weight" not in unread
    assert "model.norm.weight" in unread
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is missing"):
        q.tensor("bias")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/x.safetensors", "absent.safetensors", "a.bin", 3])
def test_an_index_cannot_point_elsewhere(tiny_llama: Callable[..., Path], tmp_path: Path, file: object) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ModelError, match="index"):
        open_checkpoint(tmp_path)


def test_broken_and_missing_files_are_named(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
    with pytest.raises(ModelError, match="no safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="convert it to safetensors"):
        open_checkpoint(tmp_path)
    whole = (tiny_llama() / "model.safetensors").read_bytes()
    for data in (b"", whole[:100], b"\xff" * 8 + whole[8:], whole[:-1]):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path).names()


def test_quantized_checkpoints_are_refused_by_name(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((tiny_llama() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="gptq"):
        open_checkpoint(tmp_path)


def test_gguf_rows_come_back_to_half_split_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((32, 32), np.float32), rng.standard_normal((16, 32), np.float32)
    bias = rng.standard_normal(32, np.float32)
    path = small_gguf(
        tmp_path,
        {
            "blk.0.attn_q.weight": floats(interleaved(q, 4)),
            "blk.0.attn_q.bias": floats(interleaved(bias, 4)),
            "blk.0.attn_k.weight": floats(interleaved(k, 2)),
            "blk.0.attn_v.weight": floats(k),
            "rope_freqs.weight": floats(np.ones(4, np.float32)),
            "output.weight": floats(q[:16]),
            "blk.0.unheard_of.weight": floats(bias),
        },
    )
    checkpoint = open_checkpoint(path)
    attention = checkpoint.root / "model.layers.0.self_attn"
    np.testing.assert_array_equal((attention / "q_proj").tensor("weight"), q)
    np.testing.assert_array_equal((attention / "q_proj").tensor("bias"), bias)
    np.testing.assert_array_equal((attention / "k_proj").tensor("weight"), k)
    np.testing.assert_array_equal((attention / "v_proj").tensor("weight"), k)
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), q[:16])
    assert checkpoint.has("rope_freqs.weight")
    assert checkpoint.config.tie_word_embeddings is False
    assert checkpoint.config.attention_bias
    assert checkpoint.unread() == ["rope_freqs.weight", "blk.0.unheard_of.weight"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({"token_embd.weight": (16, (1, 256), bytes(66))}, {}, "token_embd.weight: .*IQ2_XXS"),
        ({"blk.0.attn_q.weight": floats(np.ones((12, 4), np.float32))}, {}, "blk.0.attn_q.weight: 12 rows"),
        ({}, {"general.architecture": "unheard-of"}, "general.architecture: 'unheard-of'"),
        ({}, {"split.count": 2}, "split.count"),
        ({}, {"llama.block_count": 0}, "llama.block_count"),
        ({}, {"llama.attention.head_count": "4"}, "llama.attention.head_count"),
        (
            {"output.weight": floats(np.ones(2, np.float32)), "lm_head.weight": floats(np.ones(2, np.float32))},
            {},
            "lm_head.weight: another tensor",
        ),
    ],
)
def test_gguf_files_we_cannot_serve_are_refused(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, Any], problem: str
) -> None:
    path = small_gguf(tmp_path, tensors, **metadata)
    with pytest.raises(ModelError, match=rf"small\.gguf: {problem}"):
        read_all(path)


def test_the_default_model_has_every_name_and_exact_values(default_model: Path) -> None:
    checkpoint = open_checkpoint(default_model)
    floats_only = open_checkpoint(default_model, dequantize=True)
    assert (checkpoint.packed, floats_only.packed) == (True, False)
    name = "model.layers.29.self_attn.q_proj.weight"
    packed = checkpoint.matrix(name)
    assert isinstance(packed, Packed)
    assert packed.layout == (4, 32, 0, True)
    plain = floats_only.matrix(name)
    assert isinstance(plain, np.ndarray)
    np.testing.assert_array_equal(packed.dequantize(), plain)
    reader = checkpoint.file  # type: ignore[attr-defined]
    expected = gguf.quants.dequantize(reader.data("blk.29.attn_q.weight"), gguf.GGMLQuantizationType.Q4_1)
    half_split = expected.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    np.testing.assert_array_equal(plain, half_split)
    per_layer = 9
    assert len(checkpoint.names()) == 2 + 30 * per_layer
    assert all(item.startswith("model.") for item in checkpoint.names())
    embedding = checkpoint.matrix("model.embed_tokens.weight")
    assert isinstance(embedding, Packed)
    assert (embedding.bits, embedding.zero) == (8, 128)
