"""A .gguf file as a checkpoint: llama.cpp's names, row orders and stored values are put right on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.quant import ggml
from textmill.quant.ggml_types import GGML_TYPES
from textmill.quant.packed import Packed
from textmill.weights.checkpoint import Checkpoint, as_slice
from textmill.weights.gguf import GgufFile
from textmill.weights.gguf_config import config_from_gguf
from textmill.weights.gguf_names import family_of
from textmill.weights.gguf_tensors import Rows, Stored, tensors_of
from textmill.weights.stretches import Indices

if TYPE_CHECKING:
    from textmill.kernels.spec import Array


class GgufCheckpoint(Checkpoint):
    """One .gguf file. `dequantize`: `matrix` gives float32 too."""

    def __init__(self, path: Path, *, dequantize: bool = False) -> None:
        self.file = GgufFile(path)
        if self.file.metadata.get("split.count", 1) not in (0, 1):
            raise ModelError(f"{path}: split.count: split files are not supported; join them with llama-gguf-split")
        super().__init__(path, config_from_gguf(self.file))
        self._dequantize = dequantize
        self._tensors = tensors_of(self.file, family_of(self.file), self.config)

    @property
    def packed(self) -> bool:
        return not self._dequantize and any(
            ggml.can_pack(stored.tensor.ggml_type) for stored in self._tensors.values() if stored.is_matrix
        )

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        self._known(name)
        return self._tensors[name].shape

    def _index(self) -> dict[str, Any]:
        return self._tensors

    def _tensor(self, name: str, rows: Indices | None, inputs: Indices | None) -> NDArray[np.float32]:
        stored = self._tensors[name]
        values = self._stacked(stored, rows)
        if stored.fix is not None:
            values = stored.fix(values)
        if inputs is None:
            return values.reshape(-1, *stored.shape[1:])
        return np.ascontiguousarray(values[:, as_slice(inputs) if isinstance(inputs, range) else inputs])

    def _stacked(self, stored: Stored, rows: Indices | None) -> NDArray[np.float32]:
        pieces, order = stored.places(rows)
        read = [self._floats(piece) for piece in pieces]
        values = read[0] if len(read) == 1 else np.concatenate(read)
        return values if order is None else values[order]

    def _floats(self, part: Rows) -> NDArray[np.float32]:
        tensor = part.tensor
        if not ggml.can_read(tensor.ggml_type):
            kind = GGML_TYPES[tensor.ggml_type].name
            raise ModelError(f"{self.path}: {tensor.name}: tensors of type {kind} are not supported")
        shape = (len(part.rows), *tensor.shape[1:][-1:])
        return ggml.dequantize(tensor.ggml_type, self._bytes(part), shape)

    def _matrix(self, name: str, rows: Indices | None, inputs: Indices | None) -> Packed | Array:
        stored = self._tensors[name]
        packs = stored.is_matrix and all(ggml.can_pack(part.tensor.ggml_type) for part in stored.parts)
        if self._dequantize or not packs:
            return self._tensor(name, rows, inputs)
        if inputs is not None and not isinstance(inputs, range):
            where = f"{self.path}: {stored.tensor.name}"
            raise ModelError(f"{where}: inputs of a packed matrix cannot be put in another order")
        pieces, order = stored.places(rows)
        read = [self._unpack(piece, inputs or range(stored.shape[1])) for piece in pieces]
        packed = read[0] if len(read) == 1 else Packed.join(read)
        return packed if order is None else packed.take(order)

    def _bytes(self, part: Rows) -> NDArray[np.uint8]:
        data, tensor = self.file.data(part.tensor.name), part.tensor
        width = data.size // (tensor.shape[0] if len(tensor.shape) == 1 else int(np.prod(tensor.shape[:-1])))
        return data[part.rows.start * width : part.rows.stop * width]

    def _unpack(self, part: Rows, inputs: range) -> Packed:
        """Some rows and inputs of a packed matrix; whole blocks are cut as bytes, parts of them between groups."""
        tensor = part.tensor
        kind, data, rows = GGML_TYPES[tensor.ggml_type], self._bytes(part), len(part.rows)
        if len(inputs) == tensor.shape[-1]:
            return ggml.unpack(kind.number, data, rows, len(inputs))
        first, last = inputs.start // kind.block, -(-inputs.stop // kind.block)
        cut = np.ascontiguousarray(data.reshape(rows, -1, kind.bytes)[:, first:last])
        packed = ggml.unpack(kind.number, cut.reshape(-1), rows, (last - first) * kind.block)
        start = inputs.start - first * kind.block
        if (start, start + len(inputs)) == (0, packed.shape[1]):
            return packed
        try:
            return packed.cut(1, start, start + len(inputs))
        except ValueError as error:
            raise ModelError(f"{self.path}: {tensor.name}: {kind.name}: {error}") from error
