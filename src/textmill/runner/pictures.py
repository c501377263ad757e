"""What the pictures of running sequences are to the model: encoded when first needed, kept while they are shown."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from textmill.core import Image
from textmill.layers.types import Encoder

log = logging.getLogger(__name__)
Work = Sequence[tuple[int, int, int]]
"""(slot, start, count), whose rows lie one after the other."""


class Pictures:
    """`shown`: the images of each slot that has any. Sequences that show the same picture share its features."""

    def __init__(self, shown: dict[int, tuple[Image, ...]]) -> None:
        self._shown = shown
        self._features: dict[bytes, Tensor] = {}
        self.progress_ns = 0  # when an encoder last got on

    def place(self, x: Tensor, work: Work, encoder: Encoder) -> Tensor:
        """x [rows, columns] with features in the rows that stand for images."""
        found = self.rows(work, x.shape[-1], encoder)
        if found is not None:
            x[torch.from_numpy(found[0] >= 0)] = torch.from_numpy(found[1])
        return x

    @torch.inference_mode()
    def rows(self, work: Work, columns: int, encoder: Encoder) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
        """For each row of the work which of the features stands for it (-1: none), and these in order [n, columns].

        None where no row stands for an image. Features that do not fit are not numbers.
        """
        numbers = np.full(sum(count for _, _, count in work), -1, np.int32)
        features: list[Tensor] = []
        row = filled = 0
        for slot, start, count in work:
            for image in self._shown.get(slot, ()):
                first, last = max(image.start, start), min(image.start + image.count, start + count)
                if first < last:
                    features.append(self._part(image, range(first, last), columns, encoder))
                    numbers[row + first - start : row + last - start] = range(filled, filled + last - first)
                    filled += last - first
            row += count
        return (numbers, torch.cat(features).numpy()) if features else None

    def _part(self, image: Image, positions: range, columns: int, encoder: Encoder) -> Tensor:
        features = self._features_of(image, encoder)
        if features.shape != (image.count, columns):
            return torch.full((len(positions), columns), torch.nan)
        return features[positions.start - image.start : positions.stop - image.start]

    def attend(self, q: Tensor, work: Work, layer: int, heads: int, encoder: Encoder) -> Tensor:
        """Queries [rows, heads x d] over keys and values of the image that each row sees; zeros where it sees none."""
        out = torch.zeros_like(q)
        row = 0
        for slot, start, count in work:
            for image, first, last in seen(self._shown.get(slot, ()), start, start + count):
                features = self._features_of(image, encoder)
                rows = slice(row + first - start, row + last - start)
                out[rows] = attended(q[rows], features[layer], heads) if features.ndim == 3 else torch.nan
            row += count
        return out

    def _features_of(self, image: Image, encoder: Encoder) -> Tensor:
        """What the encoder makes of it; nothing, which fits nowhere and fails this sequence alone, if it cannot."""
        known = self._features.get(image.digest)
        if known is None:
            self._forget()
            try:
                known = encoder(normalised(image), image.size, self._tick)
            except (RuntimeError, ValueError):
                log.exception("an image of shape %s could not be encoded", image.shape)
                known = torch.empty(0)
            self._features[image.digest] = known
        return known

    def _tick(self) -> None:
        self.progress_ns = time.monotonic_ns()

    def _forget(self) -> None:
        """Drop what no running sequence shows any more."""
        shown = {image.digest for images in self._shown.values() for image in images}
        for digest in self._features.keys() - shown:
            del self._features[digest]


def seen(images: Sequence[Image], start: int, end: int) -> Iterator[tuple[Image, int, int]]:
    """Which image the positions start .. end see, as ranges (image, first, last): the last that began."""
    for number, image in enumerate(images):
        until = images[number + 1].start if number + 1 < len(images) else end
        until = min(until, image.until) if image.until else until
        first, last = max(image.start, start), min(until, end)
        if first < last:
            yield image, first, last


def attended(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Queries [rows, heads x d] over keys and values [keys, 2 x heads x d]; like the queries."""
    k, v = kv.chunk(2, dim=-1)
    q, k, v = (x.reshape(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


def normalised(image: Image) -> Tensor:
    """The tower's input: float32 [tiles, 3, height, width]."""
    pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(image.shape).float()
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (image.mean, image.std))
    return (pixels / 255 - mean) / std
