"""What the pictures of running sequences are to the model: encoded when first needed, kept while they are shown."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from textmill.core import Image
from textmill.layers.types import Encoder

log = logging.getLogger(__name__)


class Pictures:
    """`shown`: the images of each slot that has any. Sequences that show the same picture share its features."""

    def __init__(self, shown: dict[int, tuple[Image, ...]]) -> None:
        self._shown = shown
        self._features: dict[bytes, Tensor] = {}

    def place(self, x: Tensor, work: Sequence[tuple[int, int, int]], encoder: Encoder) -> Tensor:
        """x [rows, columns] of the work (slot, start, count), with features in the rows that stand for images."""
        row = 0
        for slot, start, count in work:
            for image in self._shown.get(slot, ()):
                first, last = max(image.start, start), min(image.start + image.count, start + count)
                if first < last:
                    features = self.features(image, encoder, x.shape[-1])
                    x[row + first - start : row + last - start] = features[first - image.start : last - image.start]
            row += count
        return x

    def features(self, image: Image, encoder: Encoder, columns: int) -> Tensor:
        """[count, columns]; not-a-number throughout if the encoder cannot read it: that fails this sequence alone."""
        known = self._features.get(image.digest)
        if known is None:
            self._forget()
            try:
                known = encoder(normalised(image), image.size)
            except (RuntimeError, ValueError):
                log.exception("an image of shape %s could not be encoded", image.shape)
                known = torch.empty(0)
            self._features[image.digest] = known
        return known if known.shape == (image.count, columns) else torch.full((image.count, columns), torch.nan)

    def _forget(self) -> None:
        """Drop what no running sequence shows any more."""
        shown = {image.digest for images in self._shown.values() for image in images}
        for digest in self._features.keys() - shown:
            del self._features[digest]


def normalised(image: Image) -> Tensor:
    """The tower's input: float32 [tiles, 3, height, width]."""
    pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(image.shape).float()
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (image.mean, image.std))
    return (pixels / 255 - mean) / std
