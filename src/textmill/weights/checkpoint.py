"""A checkpoint as one lazy mapping under Hugging Face names, whatever files it lies in; tensors are read when asked.

GGUF files are read with numpy; torch is imported only for what it alone can read.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textmill.errors import ModelError
from textmill.weights.config import ModelConfig, config_from_folder, read_json
from textmill.weights.stretches import Indices, stretches
from textmill.weights.view import View

if TYPE_CHECKING:
    import torch

    from textmill.kernels.spec import Array
    from textmill.quant.packed import Packed


# What old files hold beside the weights, and any code computes anew: rotary frequencies, masks, counts of positions.
_BUFFER = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|(attn|attention|self_attention)\.(bias|masked_bias)|position_ids)")


class Checkpoint(ABC):
    """Names to tensors. `tensor` gives float32; `matrix` gives a Packed where the file holds one, else float32.

    Both give, and read, only the asked `rows` (of the first dimension) and `inputs` (of the second); None is all.
    `unread()` names what nobody asked for: a model that leaves weights unread is a wrong model.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self.config = config
        self._read: set[str] = set()

    @property
    def root(self) -> View:
        """The view from which a model pulls its weights."""
        return View(self)

    @property
    def packed(self) -> bool:
        """True if some matrix comes as integer codes; False for a float checkpoint, which is computed exactly."""
        return False

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; raises ModelError for a name that is not there."""

    @abstractmethod
    def _tensor(self, name: str, rows: Indices | None, inputs: Indices | None) -> Array: ...

    def _matrix(self, name: str, rows: Indices | None, inputs: Indices | None) -> Packed | Array:
        return self._tensor(name, rows, inputs)

    def has(self, name: str) -> bool:
        return name in self._index()

    @abstractmethod
    def _index(self) -> dict[str, Any]: ...

    def tensor(self, name: str, rows: Indices | None = None, inputs: Indices | None = None) -> Array:
        self._note(name)
        return self._tensor(name, rows, inputs)

    def matrix(self, name: str, rows: Indices | None = None, inputs: Indices | None = None) -> Packed | Array:
        self._note(name)
        return self._matrix(name, rows, inputs)

    def unread(self) -> list[str]:
        return [name for name in self.names() if name not in self._read and not _BUFFER.fullmatch(name)]

    def leave_out(self, prefix: str) -> None:
        """The model has no use for what lies under a prefix: it is not missed."""
        self._read.update(name for name in self.names() if name.startswith(prefix))

    def _note(self, name: str) -> None:
        self._known(name)
        self._read.add(name)

    def _known(self, name: str) -> None:
        if not self.has(name):
            raise ModelError(f"{self.path}: tensor {name} is missing")


def open_checkpoint(path: str | Path, *, dequantize: bool = False) -> Checkpoint:
    """Opens a folder of safetensors (or of PyTorch's own files) or a .gguf file.

    `dequantize`: `matrix` gives float32 too (the float path).
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from textmill.weights.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path, dequantize=dequantize)
    if not path.is_dir():
        raise ModelError(f"{path}: neither a folder nor a .gguf file")
    if not any(path.glob("*.safetensors*")):
        from textmill.weights.torch_files import TorchCheckpoint, torch_files

        if torch_files(path):
            return TorchCheckpoint(path)
    return SafetensorsCheckpoint(path)


def config_of_floats(folder: Path) -> ModelConfig:
    """The config of a folder whose tensors are plain floats; ModelError if it says that they are not."""
    c = config_from_folder(folder)
    method = c.raw.get("quantization_config")
    if method:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ModelError(f"{folder}: quantization_config: checkpoints of method {name!r} are not supported yet")
    return c


class SafetensorsCheckpoint(Checkpoint):
    """A folder of safetensors files, with or without an index; values of 16 bits are widened to float32."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, config_of_floats(folder))
        self._files: dict[str, Any] = {}
        self._where = _files_of_tensors(folder, self._open)

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        self._known(name)
        return tuple(self._slice(name).get_shape())

    def _index(self) -> dict[str, Any]:
        return self._where

    def _tensor(self, name: str, rows: Indices | None, inputs: Indices | None) -> Array:
        stored = self._slice(name)
        tensor: torch.Tensor = stored[...] if rows is None and inputs is None else _part(stored, rows, inputs)
        return tensor.float() if tensor.is_floating_point() else tensor

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(self._where[name]).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._where[name]}: {name}: {error}") from error

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        file = self._files.get(str(path))
        if file is None:
            try:
                file = self._files[str(path)] = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
        return file


def as_slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _part(stored: Any, rows: Indices | None, inputs: Indices | None) -> torch.Tensor:
    """These rows and inputs of a tensor in a file (one dimension: only rows), read piece by piece."""
    import torch

    shape = stored.get_shape()
    pieces, order = stretches(range(shape[0]) if rows is None else rows)
    if inputs is None:
        read = [stored[as_slice(piece)] for piece in pieces]
        whole = read[0] if len(read) == 1 else torch.cat(read)
        return whole if order is None else whole[order]
    across, places = stretches(inputs)
    read = [torch.cat([stored[as_slice(piece), as_slice(part)] for part in across], dim=1) for piece in pieces]
    whole = torch.cat(read) if order is None else torch.cat(read)[order]
    return whole if places is None else whole[:, places]


def _files_of_tensors(folder: Path, opened: Any) -> dict[str, Path]:
    """Which file holds which tensor: by model.safetensors.index.json, else in model.safetensors, else in any."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(folder, index)
    single = folder / "model.safetensors"  # other files beside it hold the same once more, in their makers' layout
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(_nothing_to_read(folder))
    where: dict[str, Path] = {}
    for path in files:
        for name in opened(path).keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            if name in where:
                raise ModelError(f"{path}: {name}: the tensor is in {where[name].name} too")
            where[name] = path
    return where


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: weight_map is missing")
    for name, file in names.items():
        # A file name with a folder in it could point anywhere on this machine.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map: {name}: {json.dumps(file)} is not the name of a safetensors file")
        if not (folder / file).is_file():
            raise ModelError(f"{folder / file}: missing, but the index names it")
    return {name: folder / file for name, file in names.items()}


def _nothing_to_read(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return f"{folder}: .bin files, but no pytorch_model.bin; convert them to safetensors"
    return f"{folder}: no safetensors files here"
