"""pytorch_model.bin: tensors of PyTorch's own files, read lazily and without running anything that they pickle.

Such a file is a zip archive: `data.pkl` describes tensors, one uncompressed member each holds a storage's numbers
(torch/serialization.py). The description is unpickled with our own stand-ins for the few names it needs; any other
name is refused, so that a file can describe tensors and do nothing else. Neither needs torch.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.weights.checkpoint import Checkpoint, config_of_floats
from textmill.weights.config import read_json
from textmill.weights.stretches import Indices

_LARGEST_DESCRIPTION = 256 << 20
_INDEX = "pytorch_model.bin.index.json"
_SINGLE = "pytorch_model.bin"


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of numbers; bfloat16 is kept as the upper half of a float32."""

    stored: str
    upper_half: bool = False


_KINDS = {
    "FloatStorage": Kind("<f4"),
    "DoubleStorage": Kind("<f8"),
    "HalfStorage": Kind("<f2"),
    "BFloat16Storage": Kind("<u2", upper_half=True),
    "LongStorage": Kind("<i8"),
    "IntStorage": Kind("<i4"),
    "ShortStorage": Kind("<i2"),
    "CharStorage": Kind("<i1"),
    "ByteStorage": Kind("<u1"),
    "BoolStorage": Kind("?"),
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers of one kind in the archive's member `key`."""

    kind: Kind
    key: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor: a window of a storage, in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Names(dict[Any, Any]):
    """Stands for an OrderedDict. Attributes that a pickle sets on it are dropped."""

    def __setstate__(self, _state: object) -> None:
        pass


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> Stored:
    """Stands for `_rebuild_tensor_v2`."""
    window = (offset, *(shape if isinstance(shape, tuple) else ()), *(strides if isinstance(strides, tuple) else ()))
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise pickle.UnpicklingError("a tensor without a storage or a shape")
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in window):
        raise pickle.UnpicklingError("a tensor's shape is senseless")
    return Stored(storage, int(str(offset)), shape, strides)


def _parameter(data: object, *_: object) -> object:
    """Stands for `_rebuild_parameter`."""
    return data


_KNOWN: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Names,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): kind for name, kind in _KINDS.items()},
}


class _Description(pickle.Unpickler):
    """Unpickles what a file says of its tensors."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tensor needs")
        return known

    def persistent_load(self, identity: Any) -> Storage:
        match identity:
            case ("storage", Kind() as kind, str(key), *_):
                return Storage(kind, key)
        raise pickle.UnpicklingError("a storage is described in an unknown way")


class TorchFile:
    """One file; ModelError for what is none or asks for more than tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member for member in archive.infolist()}
                pickled = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
                if len(pickled) != 1 or members[pickled[0]].file_size > _LARGEST_DESCRIPTION:
                    raise ModelError(f"{path}: not a file of tensors")
                self._root = pickled[0].removesuffix("data.pkl")
                order = f"{self._root}byteorder"
                if order in members and archive.read(order) != b"little":
                    raise ModelError(f"{path}: its numbers are not little-endian")
                found = _Description(io.BytesIO(archive.read(pickled[0]))).load()
            self._members = members
        except zipfile.BadZipFile as error:
            raise ModelError(f"{path}: not a file of PyTorch 1.6 or later; convert it to safetensors") from error
        except (OSError, pickle.UnpicklingError, *_MALFORMED) as error:
            raise ModelError(f"{path}: cannot be read as a file of tensors: {error}") from error
        if not isinstance(found, dict):
            raise ModelError(f"{path}: holds no names")
        self.tensors = {str(name): item for name, item in found.items() if isinstance(item, Stored)}

    def read(self, name: str, rows: Indices | None, inputs: Indices | None) -> NDArray[Any]:
        """Some rows and inputs of a tensor; floats of any width as float32."""
        stored = self.tensors[name]
        kind = stored.storage.kind
        values = self._window(stored)
        for axis, wanted in enumerate((rows, inputs)):
            if wanted is not None:
                part = slice(wanted.start, wanted.stop) if isinstance(wanted, range) else wanted
                values = values[(slice(None),) * axis + (part,)]
        if kind.upper_half:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else None)

    def _window(self, stored: Stored) -> NDArray[Any]:
        """The tensor as it lies in the file, which is mapped, not read."""
        numbers = self._numbers(stored.storage)
        last = stored.offset + sum((size - 1) * step for size, step in zip(stored.shape, stored.strides, strict=True))
        if math.prod(stored.shape) > len(numbers) or (0 not in stored.shape and last >= len(numbers)):
            raise ModelError(f"{self.path}: a tensor reaches beyond its storage")
        strides = tuple(step * numbers.itemsize for step in stored.strides)
        return np.lib.stride_tricks.as_strided(numbers[stored.offset :], stored.shape, strides)

    def _numbers(self, storage: Storage) -> NDArray[Any]:
        member = self._members.get(f"{self._root}data/{storage.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{self.path}: storage {storage.key} is missing or compressed")
        dtype = np.dtype(storage.kind.stored)
        if not member.file_size:
            return np.empty(0, dtype)
        with self.path.open("rb") as file:  # the local header says how long it is itself
            file.seek(member.header_offset + 26)
            name, extra = np.frombuffer(file.read(4), "<u2")
        start = member.header_offset + 30 + int(name) + int(extra)
        try:
            return np.memmap(self.path, dtype, "c", start, (member.file_size // dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path}: storage {storage.key}: {error}") from error


# What unpickling a broken or hostile description may raise beside UnpicklingError.
_MALFORMED = (
    AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip


class TorchCheckpoint(Checkpoint):
    """A folder with pytorch_model.bin, or several with an index."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, config_of_floats(folder))
        self._where: dict[str, TorchFile] = {}
        for path in torch_files(folder):
            file = TorchFile(path)
            self._where |= dict.fromkeys(file.tensors, file)

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        self._known(name)
        return self._where[name].tensors[name].shape

    def _index(self) -> dict[str, Any]:
        return self._where

    def _tensor(self, name: str, rows: Indices | None, inputs: Indices | None) -> NDArray[Any]:
        return self._where[name].read(name, rows, inputs)


def torch_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its model, by the index or by name; none if there are none."""
    if not (folder / _INDEX).is_file():
        return [folder / _SINGLE] if (folder / _SINGLE).is_file() else []
    names = read_json(folder / _INDEX).get("weight_map")
    files = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    for name in files:
        # A file name with a folder in it could point anywhere on this machine.
        if Path(name).name != name or not name.endswith(".bin") or not (folder / name).is_file():
            raise ModelError(f"{folder / _INDEX}: weight_map: {name!r} is not the name of a file here")
    return [folder / name for name in files]
