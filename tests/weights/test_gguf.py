"""GGUF headers: real ones are read whole and quickly, broken ones are refused with the file and the field."""

from __future__ import annotations

import re
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_writer import floats, gguf_bytes, header, string, tensor_info, value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textmill.errors import ModelError
from textmill.weights.gguf import GgufFile

GOOD = gguf_bytes(
    {
        "general.architecture": "llama",
        "general.alignment": 64,
        "a.float": 0.5,
        "a.flag": True,
        "a.list": [1, 2, 3],
        "a.texts": ["x", "", "ü😀"],
    },
    {
        "one.weight": floats(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "two.weight": (3, (2, 64), bytes(range(80))),
    },
)


def opened(folder: Path, data: bytes) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def refusal(folder: Path, data: bytes) -> str:
    """The message of the refusal, which must come fast and with little memory."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(ModelError) as caught:
            GgufFile(path)
        assert time.perf_counter() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    return caught.value.message


def test_a_small_file_is_read_as_written(tmp_path: Path) -> None:
    file = opened(tmp_path, GOOD)
    assert file.metadata["a.float"] == 0.5
    assert file.metadata["a.flag"] is True
    assert file.metadata["a.list"] == [1, 2, 3]
    assert file.metadata["a.texts"] == ["x", "", "ü😀"]
    assert file.tensors["one.weight"].shape == (2, 3)
    np.testing.assert_array_equal(file.data("one.weight").view("<f4"), np.arange(6, dtype=np.float32))
    assert file.tensors["two.weight"].nbytes == 80
    assert bytes(file.data("two.weight")) == bytes(range(80))
    assert file.tensors["two.weight"].offset % 64 == 0


def test_a_file_of_gguf_py_is_read_as_gguf_py_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.metadata["llama.context_length"] == 77
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    np.testing.assert_array_equal(file.data("w").view("<f4"), np.arange(64))


def test_the_default_model_is_read_quickly_and_whole(default_model: Path) -> None:
    started = time.perf_counter()
    file = GgufFile(default_model)
    assert time.perf_counter() - started < 1  # 0.05 to 0.1 s on a quiet machine
    assert len(file.tensors) == 272
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
    last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    assert last.offset + last.nbytes <= default_model.stat().st_size


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    needed = opened(tmp_path, GOOD).tensors["two.weight"]
    for length in range(needed.offset + needed.nbytes):
        path.write_bytes(GOOD[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            GgufFile(path)


ONE_TENSOR = header(3, 1, 0)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "cannot be read"),
        (b"GGML" + GOOD[4:], "magic"),
        (header(1, 0, 0), "version"),
        (header(3 << 24, 0, 0), "big-endian"),
        (header(3, 2**63, 0), "tensor_count"),
        (header(3, 0, 2**63), "metadata_kv_count"),
        (header(3, 0, 1) + struct.pack("<Q", 2**63), "metadata key 0"),
        (header(3, 0, 1) + string(b"\xff\xfe") + value(1), "metadata key 0"),
        (header(3, 0, 2) + (string("k") + value(1)) * 2, "k: the key occurs twice"),
        (header(3, 0, 1) + string("k") + struct.pack("<I", 255), "k: value type 255"),
        (header(3, 0, 1) + string("k") + struct.pack("<IQ", 8, 2**62), "k"),
        (header(3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 2**62), "k"),
        (header(3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 4, 2**62), "k"),
        (header(3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 0, 2**24), "k"),
        (header(3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1), "arrays of arrays"),
        (header(3, 0, 1) + string("general.alignment") + value(0), "general.alignment"),
        (header(3, 0, 1) + string("general.alignment") + value(3), "general.alignment"),
        (header(3, 0, 1) + string("general.alignment") + value(2**31), "general.alignment"),
        (header(3, 0, 1) + string("general.alignment") + value("32"), "general.alignment"),
        (ONE_TENSOR + tensor_info("t", (2**32, 2**32), 0, 0), "t: .*end of the file"),
        (ONE_TENSOR + tensor_info("t", (2**63, 2**63, 2**63, 2**63), 0, 0), "t: .*end of the file"),
        (ONE_TENSOR + tensor_info("t", (0, 32), 0, 0), "t: shape"),
        (ONE_TENSOR + tensor_info("t", (1, 33), 2, 0), "t: shape"),
        (ONE_TENSOR + tensor_info("t", (1,) * 5, 0, 0), "t: 5 dimensions"),
        (ONE_TENSOR + string("t") + struct.pack("<I", 2**31), "t: 2147483648 dimensions"),
        (ONE_TENSOR + tensor_info("t", (1, 32), 4, 0), "t: tensor type 4"),
        (ONE_TENSOR + tensor_info("t", (1, 32), 255, 0), "t: tensor type 255"),
        (ONE_TENSOR + tensor_info("t", (1, 32), 0, 7) + bytes(999), "t: offset 7"),
        (ONE_TENSOR + tensor_info("t", (1, 32), 0, 2**63) + bytes(999), "t: .*end of the file"),
        (header(3, 2, 0) + tensor_info("t", (1, 8), 0, 0) * 2 + bytes(999), "t: the tensor occurs twice"),
        (
            header(3, 2, 0) + tensor_info("t", (1, 32), 0, 0) + tensor_info("u", (1, 32), 0, 32) + bytes(999),
            "u: its bytes overlap those of t",
        ),
    ],
)
def test_wrong_numbers_are_refused_with_the_field(tmp_path: Path, data: bytes, field: str) -> None:
    assert re.search(field, refusal(tmp_path, data))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf"):
        GgufFile(tmp_path / "none.gguf")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(GOOD) - 1), new=st.binary(min_size=1, max_size=8))
def test_any_damage_is_read_or_refused_never_worse(tmp_path: Path, at: int, new: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(GOOD[:at] + new + GOOD[at + len(new) :])
    try:
        file = GgufFile(path)
    except ModelError:
        return
    for name, tensor in file.tensors.items():
        assert file.data(name).size == tensor.nbytes
