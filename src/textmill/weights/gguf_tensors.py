"""Where each of our tensors lies in a GGUF file, and how the values stored there become ours.

Sources: llama.cpp's convert_hf_to_gguf.py for what it does to which tensor; checked against files it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from textmill.errors import ModelError
from textmill.weights.config import ModelConfig
from textmill.weights.gguf import GgufFile, GgufTensor
from textmill.weights.gguf_names import Family, Name, outer_name, place_of_block, stems_of, taken_apart
from textmill.weights.stretches import Indices, composed, stretches

Floats: TypeAlias = NDArray[np.float32]
Order: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a stored tensor; one of three dimensions [a, b, c] counts as a x b rows of c."""

    tensor: GgufTensor
    rows: range


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One of our tensors: stored rows stacked, row i of ours being row `order[i]` of the stack (None: in order).

    `shape` is ours. `fix` changes the values.
    """

    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    order: Order | None = None
    fix: Callable[[Floats], Floats] | None = None

    @property
    def tensor(self) -> GgufTensor:
        """The stored tensor, or the first of several."""
        return self.parts[0].tensor

    @property
    def is_matrix(self) -> bool:
        """True if its rows can be multiplied with as they are stored, packed."""
        return len(self.shape) == 2 and self.fix is None

    def places(self, rows: Indices | None) -> tuple[list[Rows], Order | None]:
        """What to read for these rows of ours, one after the other, and which of what was read to take."""
        wanted = composed(self.order, rows)
        pieces, order = stretches(range(sum(len(p.rows) for p in self.parts)) if wanted is None else wanted)
        return [found for piece in pieces for found in self._within(piece)], order

    def _within(self, wanted: range) -> Iterator[Rows]:
        start = 0
        for part in self.parts:
            first, last = max(wanted.start - start, 0), min(wanted.stop - start, len(part.rows))
            if first < last:
                yield Rows(part.tensor, part.rows[first:last])
            start += len(part.rows)


def whole(tensor: GgufTensor) -> Stored:
    return Stored(tensor.shape, (Rows(tensor, range(row_count(tensor))),))


def row_count(tensor: GgufTensor) -> int:
    return tensor.shape[0] if len(tensor.shape) == 1 else prod(tensor.shape[:-1])


def tensors_of(file: GgufFile, family: Family, c: ModelConfig) -> dict[str, Stored]:
    """All of our tensors by name. ModelError where two have one name, or a shape does not fit the config."""
    found: dict[str, Stored] = {}
    joined = {stem for stems in family.joined.values() for stem in stems}
    waiting: dict[str, dict[str, Stored]] = {}  # of a tensor that lies in several, those found so far
    for name, tensor in file.tensors.items():
        if name in CONSUMED.get(family.architecture, ()):
            continue
        parts = taken_apart(name)
        if parts is not None and parts.stem in joined:
            for ours, stems in family.joined.items():
                if parts.stem in stems:
                    key = f"{place_of_block(family, parts)}{ours}.{parts.leaf}"
                    waiting.setdefault(key, {})[parts.stem] = reordered(file, family, c, tensor, parts)
            continue
        for ours, stored in named(file, family, c, tensor, parts):
            if ours in found:
                raise ModelError(f"{file.path}: {name}: another tensor is called {ours} already")
            found[ours] = stored
    for key, pieces in waiting.items():
        stems = next(stems for ours, stems in family.joined.items() if f".{ours}." in key)
        if missing := [stem for stem in stems if stem not in pieces]:
            raise ModelError(f"{file.path}: {key}: its part {missing[0]} is missing")
        found[key] = stacked([pieces[stem] for stem in stems])
    return found


# Tensors that are settings: `gguf_config` reads them.
CONSUMED = {"phi3": ("rope_factors_long.weight", "rope_factors_short.weight")}


def named(
    file: GgufFile, family: Family, c: ModelConfig, tensor: GgufTensor, name: Name | None
) -> Iterator[tuple[str, Stored]]:
    """Our tensors that one stored tensor holds."""
    if name is None:
        stem = tensor.name.rpartition(".")[0]
        yield outer_name(family, tensor.name), fixed(family, stem, tensor, whole(tensor))
        return
    place, leaf = place_of_block(family, name), f".{name.leaf}" if name.leaf else ""
    if name.expert is not None:
        pattern = family.experts.get(f"{name.stem}_exps")
        yield (tensor.name if pattern is None else place + pattern.format(name.expert) + leaf), whole(tensor)
    elif name.stem in family.experts:
        yield from experts(file, place + family.experts[name.stem] + leaf, tensor)
    elif name.stem in family.split:
        yield from split(file, [f"{place}{one}{leaf}" for one in family.split[name.stem]], c, tensor)
    elif name.stem in stems_of(family, name):
        ours = stems_of(family, name)[name.stem]
        stored = fixed(family, name.stem, tensor, reordered(file, family, c, tensor, name))
        yield place + ours + leaf, stored
    else:
        yield tensor.name, whole(tensor)


def experts(file: GgufFile, pattern: str, tensor: GgufTensor) -> Iterator[tuple[str, Stored]]:
    """Every expert's matrix of a stack [experts, outputs, inputs]."""
    if len(tensor.shape) != 3:
        raise ModelError(f"{file.path}: {tensor.name}: {list(tensor.shape)} is no stack of experts")
    count, rows, inputs = tensor.shape
    for expert in range(count):
        yield pattern.format(expert), Stored((rows, inputs), (Rows(tensor, range(expert * rows, (expert + 1) * rows)),))


def split(file: GgufFile, names: list[str], c: ModelConfig, tensor: GgufTensor) -> Iterator[tuple[str, Stored]]:
    """Queries, keys and values of a matrix that holds them one after the other."""
    if tensor.shape[0] != (c.heads + 2 * c.kv_heads) * c.head_dim:
        raise ModelError(f"{file.path}: {tensor.name}: {tensor.shape[0]} rows are not those of {c.heads} heads")
    start = 0
    for name, heads in zip(names, (c.heads, c.kv_heads, c.kv_heads), strict=True):
        rows = heads * c.head_dim
        yield name, Stored((rows, *tensor.shape[1:]), (Rows(tensor, range(start, start + rows)),))
        start += rows


def stacked(parts: list[Stored]) -> Stored:
    """Several of ours in one, each with its own order of rows."""
    starts = np.cumsum([0, *(part.shape[0] for part in parts)])
    orders = [
        start + (np.arange(part.shape[0]) if part.order is None else part.order)
        for part, start in zip(parts, starts, strict=False)
    ]
    shape = (int(starts[-1]), *parts[0].shape[1:])
    return Stored(shape, tuple(row for part in parts for row in part.parts), np.concatenate(orders))


def reordered(file: GgufFile, family: Family, c: ModelConfig, tensor: GgufTensor, name: Name) -> Stored:
    """The tensor with its rows as our checkpoints have them."""
    rows = tensor.shape[0]
    order: Order | None = None
    if name.stem in family.interleaved:
        heads = c.heads if family.interleaved[name.stem] == "q" else c.kv_heads
        if rows % (2 * heads):
            raise ModelError(f"{file.path}: {tensor.name}: {rows} rows do not divide into {heads} heads")
        order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    if name.stem in family.by_head:
        if rows != (c.heads + 2 * c.kv_heads) * c.head_dim or c.heads % c.kv_heads:
            raise ModelError(f"{file.path}: {tensor.name}: {rows} rows are not those of {c.heads} heads")
        order = in_pieces(c)
    return replace(whole(tensor), order=order)


def in_pieces(c: ModelConfig) -> Order:
    """Where [q; k; v] holds the rows of a matrix with one piece [queries; key; value] per key head."""
    stored = np.arange((c.heads + 2 * c.kv_heads) * c.head_dim).reshape(-1, c.head_dim)
    queries = stored[: c.heads].reshape(c.kv_heads, -1, c.head_dim)
    keys, values = np.split(stored[c.heads :, None], 2)
    return np.concatenate([queries, keys, values], axis=1).ravel()


def fixed(family: Family, stem: str, tensor: GgufTensor, stored: Stored) -> Stored:
    """Values and shapes that llama.cpp stores otherwise."""
    if stem in family.plus_one:
        return replace(stored, fix=minus_one)
    if stem == "ssm_a":
        return replace(stored, fix=logarithm_of_negative)
    if stem == "ssm_conv1d" and len(tensor.shape) == 2:
        return replace(stored, shape=(tensor.shape[0], 1, tensor.shape[1]))
    return stored


def minus_one(values: Floats) -> Floats:
    return values - np.float32(1)


def logarithm_of_negative(values: Floats) -> Floats:
    found: Floats = np.log(-values)
    return found
