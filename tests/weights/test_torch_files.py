"""PyTorch's own files: the same numbers as safetensors, only the wanted part; nothing of a pickle is ever run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textmill.errors import ModelError
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.torch_files import TorchFile


@pytest.fixture
def saved(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Makes a folder of a config and one pytorch_model.bin with what is given."""

    def save(tensors: dict[str, Any], **options: Any) -> Path:
        (tmp_path / "config.json").write_bytes((tiny_llama() / "config.json").read_bytes())
        torch.save(tensors, tmp_path / "pytorch_model.bin", **options)
        return tmp_path

    return save


def test_a_whole_checkpoint(tiny_llama: Callable[..., Path], saved: Callable[..., Path]) -> None:
    tensors = load_file(tiny_llama() / "model.safetensors")
    checkpoint = open_checkpoint(saved(tensors))
    assert set(checkpoint.names()) == set(tensors)
    for name, expected in tensors.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        np.testing.assert_array_equal(checkpoint.tensor(name), expected.numpy())
    assert checkpoint.unread() == []
    with pytest.raises(ModelError, match="absent is missing"):
        checkpoint.tensor("absent")


def test_several_files_with_an_index(tiny_llama: Callable[..., Path], saved: Callable[..., Path]) -> None:
    tensors = load_file(tiny_llama() / "model.safetensors")
    folder = saved({})
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({"optimizer": torch.ones(3)}, folder / "training_args.bin")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(tensors)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_come_as_float32(saved: Callable[..., Path], dtype: torch.dtype) -> None:
    values = (torch.arange(48).view(6, 8) * 0.37 - 5).to(dtype)
    found = open_checkpoint(saved({"x": values})).tensor("x")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.float().numpy())


def test_only_the_wanted_rows_and_inputs(saved: Callable[..., Path]) -> None:
    values = torch.arange(48.0).view(6, 8)
    checkpoint = open_checkpoint(saved({"x": values.to(torch.bfloat16), "y": torch.arange(9)}))
    rows, inputs = np.array([4, 1, 1]), range(2, 7)
    np.testing.assert_array_equal(checkpoint.matrix("x", rows, inputs), values[[4, 1, 1], 2:7].numpy())
    np.testing.assert_array_equal(checkpoint.matrix("x", range(2, 4)), values[2:4].numpy())
    np.testing.assert_array_equal(checkpoint.tensor("y", range(3, 5)), [3, 4])


def test_views_transposed_tensors_and_parameters(saved: Callable[..., Path]) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "parameter": torch.nn.Parameter(base),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "step": 7,
    }
    names = OrderedDict(tensors)
    names._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as state_dict() has it
    checkpoint = open_checkpoint(saved(names))
    assert "step" not in checkpoint.names()
    for name, expected in tensors.items():
        if isinstance(expected, torch.Tensor):
            np.testing.assert_array_equal(checkpoint.tensor(name), expected.detach().numpy())


class Harm:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_run(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved({"x": torch.ones(2), "y": Harm(tmp_path / "harmed")})
    with pytest.raises(ModelError, match="which no tensor needs"):
        open_checkpoint(folder)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(t(ttR.",
        b"ctorch\nFloatStorage\n.",
        b"}.",
        b"I1\n.",
        b"N",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"(" * 50,
        b"",
    ],
)
def test_other_pickles(tmp_path: Path, code: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
    if code == b"}.":
        assert TorchFile(path).tensors == {}
        return
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        TorchFile(path)


def described(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A pickle of one tensor over storage "0" of floats."""

    class Reference:
        pass

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Reference(), offset, shape, strides, False, OrderedDict())

    class Writer(pickle._Pickler):  # type: ignore[name-defined, misc]
        def persistent_id(self, item: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 12) if isinstance(item, Reference) else None

    out = io.BytesIO()
    Writer(out, protocol=2).dump({"x": Rebuilt()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "right"),
    [
        ((3, 4), (4, 1), 0, True),
        ((3, 4), (4, 1), 1, False),
        ((13,), (1,), 0, False),
        ((1 << 40,), (0,), 0, False),
        ((2, 2), (100, 1), 0, False),
        ((3,), (1,), 1 << 62, False),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, right: bool
) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", described(shape, strides, offset))
        archive.writestr("archive/data/0", np.arange(12, dtype=np.float32).tobytes())
    if right:
        np.testing.assert_array_equal(TorchFile(path).read("x", None, None), np.arange(12).reshape(3, 4))
        return
    with pytest.raises(ModelError, match="beyond its storage"):
        TorchFile(path).read("x", None, None)


def test_broken_files_are_named(saved: Callable[..., Path]) -> None:
    folder = saved({"x": torch.ones(1000)})
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for data in (b"", b"\x80\x02", whole[:-30], whole[2000:], b"PK\x03\x04" + bytes(200)):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
            open_checkpoint(folder).tensor("x")


def test_files_of_before_the_archive(saved: Callable[..., Path]) -> None:
    folder = saved({"x": torch.ones(4)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="convert it to safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../pytorch_model.bin", "/etc/x.bin", "absent.bin", "a.safetensors", 3])
def test_an_index_cannot_point_elsewhere(saved: Callable[..., Path], file: object) -> None:
    folder = saved({"x": torch.ones(4)})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ModelError, match="index"):
        open_checkpoint(folder)
