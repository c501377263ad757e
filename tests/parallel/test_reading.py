"""Parts of stored matrices: what is read is what the whole matrix holds there, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models.tiny import sized
from textmill.errors import ModelError
from textmill.quant.packed import Packed
from textmill.weights import checkpoint as checkpoints
from textmill.weights.checkpoint import Checkpoint, open_checkpoint
from textmill.weights.stretches import composed, stretches

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_stretches_hold_the_wanted_rows_in_order(wanted: list[int]) -> None:
    ranges, take = stretches(np.array(wanted))
    read = np.concatenate([np.array(one) for one in ranges])
    assert (read if take is None else read[take]).tolist() == wanted


def test_two_orders_become_one() -> None:
    outer = np.array([4, 0, 2, 6])
    assert composed(outer, None) is outer
    assert composed(None, range(2)) == range(2)
    assert np.asarray(composed(outer, range(1, 3))).tolist() == [0, 2]
    assert np.asarray(composed(outer, np.array([3, 1]))).tolist() == [6, 0]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floats")
    sized("llama")(folder)
    return folder


PARTS: list[tuple[Any, Any]] = [
    (range(10, 20), None),
    (None, range(32, 64)),
    (range(3, 7), range(5, 9)),
    (np.array([5, 6, 7, 1, 2, 40]), None),
    (np.arange(40, 0, -2), np.array([9, 8, 30, 31])),
]


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_parts_of_safetensors(floats: Path, part: int) -> None:
    rows, inputs = PARTS[part]
    whole = np.asarray(open_checkpoint(floats).matrix(DOWN))
    found = open_checkpoint(floats).matrix(DOWN, rows, inputs)
    expected = whole if rows is None else whole[np.asarray(rows)]
    np.testing.assert_array_equal(np.asarray(found), expected if inputs is None else expected[:, np.asarray(inputs)])


def test_only_the_part_is_read(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counting:
        def __init__(self, stored: Any) -> None:
            self.stored = stored

        def get_shape(self) -> list[int]:
            return list(self.stored.get_shape())

        def __getitem__(self, places: Any) -> torch.Tensor:
            values: torch.Tensor = self.stored[places]
            read.append(values.numel())
            return values

    original = checkpoints.SafetensorsCheckpoint._slice
    monkeypatch.setattr(checkpoints.SafetensorsCheckpoint, "_slice", lambda *args: Counting(original(*args)))
    opened = open_checkpoint(floats)
    opened.matrix(UP, range(48))
    opened.matrix(DOWN, None, range(48, 96))
    opened.matrix(DOWN.replace("mlp.down_proj", "self_attn.q_proj"), np.r_[0:16, 32:48])
    assert read == [48 * 64, 64 * 48, 16 * 64, 16 * 64]


def packed_file(path: Path, kind: gguf.GGMLQuantizationType, inputs: int) -> Checkpoint:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("embedding_length", 64), ("block_count", 1), ("attention.head_count", 2)):
        writer.add_uint32(f"llama.{key}", value)
    for key, value in (("feed_forward_length", inputs), ("context_length", 32), ("vocab_size", 8)):
        writer.add_uint32(f"llama.{key}", value)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (64, inputs // size * width), dtype=np.uint8)  # all halves finite
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=kind)  # whose rows are stored in another order
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_parts_of_packed_matrices(tmp_path: Path, name: str) -> None:
    """Inputs cut between blocks and inside a block of 256, between its groups; rows in the file's order or not."""
    opened = packed_file(tmp_path / "x.gguf", gguf.GGMLQuantizationType[name], 768)
    for tensor in (DOWN, "model.layers.0.self_attn.q_proj.weight"):
        whole = dequantized(opened.matrix(tensor))
        for inputs in (range(256), range(256, 768), range(384), range(384, 768), range(32, 64)):
            found = opened.matrix(tensor, None, inputs)
            np.testing.assert_array_equal(dequantized(found), whole[:, inputs.start : inputs.stop])
        for rows in (range(32, 64), np.r_[0:8, 50:60]):
            np.testing.assert_array_equal(dequantized(opened.matrix(tensor, rows)), whole[np.asarray(rows)])
        np.testing.assert_array_equal(dequantized(opened.matrix(tensor, range(5), range(256))), whole[:5, :256])


def test_a_cut_inside_a_group_is_refused_by_name(tmp_path: Path) -> None:
    opened = packed_file(tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q4_0, 96)
    with pytest.raises(ModelError, match=r"ffn_down.*do not fall between groups of 32"):
        opened.matrix(DOWN, None, range(48))


def dequantized(matrix: Any) -> np.ndarray:
    assert isinstance(matrix, Packed)
    return matrix.dequantize()
