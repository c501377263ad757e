"""Part: the checkpoint of a model inside a larger one, under the names that the model alone would have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from textmill.errors import ModelError
from textmill.weights.checkpoint import Checkpoint
from textmill.weights.config import ModelConfig

if TYPE_CHECKING:
    from textmill.kernels.spec import Array
    from textmill.quant.packed import Packed
    from textmill.weights.stretches import Indices


class Part(Checkpoint):
    """`places` says where its outermost names lie in the whole: {"model": "language_model.model"} and so on.

    `stacks`: names of tensors whose last rows lie under another name in the whole. What is read here counts as read
    there.
    """

    def __init__(
        self,
        whole: Checkpoint,
        config: ModelConfig,
        places: Mapping[str, str],
        stacks: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(whole.path, config)
        self._whole = whole
        self._places = dict(places)
        self._stacks = {name: more for name, more in (stacks or {}).items() if whole.has(more)}

    @property
    def packed(self) -> bool:
        return self._whole.packed

    def there(self, name: str) -> str:
        """The name in the whole; a name that is in no place is not in it either."""
        first, dot, rest = name.partition(".")
        place = self._places.get(first)
        return "" if place is None else place + dot + rest

    def names(self) -> list[str]:
        found = []
        for ours, place in self._places.items():
            found += [ours + name[len(place) :] for name in self._whole.names() if name.startswith(place + ".")]
        return found

    def has(self, name: str) -> bool:
        return self._whole.has(self.there(name))

    def shape(self, name: str) -> tuple[int, ...]:
        first, *rest = self._whole.shape(self.there(name))
        return (first + self._whole.shape(self._stacks[name])[0], *rest) if name in self._stacks else (first, *rest)

    def unread(self) -> list[str]:
        unread = set(self._whole.unread())
        return [name for name in self.names() if self.there(name) in unread]

    def tensor(self, name: str, rows: Indices | None = None, inputs: Indices | None = None) -> Array:
        if name in self._stacks:
            return self._stacked(name, rows, inputs)
        return self._whole.tensor(self.there(name), rows, inputs)

    def matrix(self, name: str, rows: Indices | None = None, inputs: Indices | None = None) -> Packed | Array:
        if name in self._stacks:
            return self._stacked(name, rows, inputs)
        return self._whole.matrix(self.there(name), rows, inputs)

    def _stacked(self, name: str, rows: Indices | None, inputs: Indices | None) -> Array:
        parts = [np.asarray(self._whole.tensor(one), np.float32) for one in (self.there(name), self._stacks[name])]
        values: Array = np.concatenate(parts)
        values = values if rows is None else values[np.asarray(rows)]
        return values if inputs is None else values[:, np.asarray(inputs)]

    def _index(self) -> dict[str, Any]:
        return dict.fromkeys(self.names())

    def _tensor(self, name: str, rows: Indices | None, inputs: Indices | None) -> Array:
        return self.tensor(name, rows, inputs)


def text_config(c: ModelConfig) -> ModelConfig:
    """The config of the text model that a larger one holds (its own fields are those of the text model already)."""
    inner = c.raw.get("text_config")
    if not isinstance(inner, dict) or not isinstance(inner.get("model_type"), str):
        raise ModelError("config.json: text_config.model_type is missing")
    return replace(c, model_type=inner["model_type"], raw=inner)
