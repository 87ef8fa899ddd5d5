"""From stored images to what a model is trained on: order, augmentation, scaling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Dataset
from edgetrain.data.images import load_image
from edgetrain.data.tokens import TextDataset
from edgetrain.errors import UsageError
from edgetrain.randomness import Purpose, Stream, permute, uniform

__all__ = ["Augmentation", "TextBatches", "batch", "indices_of", "load_image", "to_float"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images.

    Attributes:
        shift: each image moves by -shift..shift pixels, drawn evenly for either axis. What comes in at
            the edge is 0, which is black: the background of the MNIST family.
        flip: each image is mirrored left to right with probability 1/2.

    Raises:
        UsageError: a value is of the wrong type, or negative.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.shift, int) or isinstance(self.shift, bool) or self.shift < 0:
            raise UsageError(
                f"shift is {self.shift!r}, not a whole number of pixels", "Give 0 for none, or e.g. 1 or 2."
            )
        if not isinstance(self.flip, bool):
            raise UsageError(f"flip is {self.flip!r}, not true or false", "Write flip = true or flip = false.")


def batch(
    dataset: Dataset,
    *,
    seed: int,
    stage: int,
    step: int,
    batch_size: int,
    first: int,
    count: int,
    augmentation: Augmentation,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Examples ``first .. first + count - 1`` of the ``batch_size`` examples of one optimizer step.

    Returns images ``(count, C, H, W)`` in [-1, 1] and labels ``(count,)``. A pure function of the
    arguments in which every example is drawn by its own number: batches put together from parts are equal
    to those read at once. Each ``stage`` has its own order, and sees every example once in an epoch.

    Raises:
        BadInput: the data can no longer be read.
    """
    numbers = step * batch_size + np.arange(first, first + count, dtype=np.int64)  # over the whole training
    images, labels = dataset.read(indices_of(seed, stage, numbers, dataset.num_examples))
    if augmentation.flip:
        draws = uniform(Stream(seed, Purpose.FLIP, stage, step), first, count)[:, 0]
        images = np.where((draws < 0.5)[:, None, None, None], images[..., ::-1], images)
    if augmentation.shift:
        draws = uniform(Stream(seed, Purpose.SHIFT, stage, step), first, count, 2)  # (count, 2): down, right
        images = _shifted(images, np.floor(draws * (2 * augmentation.shift + 1)).astype(np.int64), augmentation.shift)
    return to_float(images), labels


def indices_of(seed: int, stage: int, numbers: NDArray[np.int64], num_examples: int) -> NDArray[np.int64]:
    """Which examples of a data set are drawn as number ``numbers`` (n,) of a training: each once in an epoch."""
    epochs, positions = np.divmod(numbers, num_examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        order = Stream(seed, Purpose.ORDER, stage, int(epoch))
        indices[inside] = permute(order, positions[inside], num_examples)
    return indices


def to_float(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes to [-1, 1], the scale of every model: x / 127.5 - 1. Any shape."""
    scaled = images.astype(np.float32)
    scaled /= np.float32(127.5)
    scaled -= np.float32(1)
    return scaled


def _shifted(images: NDArray[np.uint8], corners: NDArray[np.int64], margin: int) -> NDArray[np.uint8]:
    """Each image ``(n, C, H, W)`` cut out of itself with a black margin, from its row of ``corners`` ``(n, 2)`` on."""
    padded = np.pad(images, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    return windows[np.arange(len(images)), :, corners[:, 0], corners[:, 1]]  # (n, C, H, W)


class TextBatches:
    """Training batches of a text: a pure function of the counters.

    Called with (stage, step, first, count): tokens, targets and weights of examples ``first`` .. ``first + count - 1``
    of the step's batch, each (count, length). The weights, float32, sum to 1 over the whole batch, unless nothing
    counts. ``stage`` has an order of its own.
    """

    def __init__(self, dataset: TextDataset, seed: int, batch_size: int) -> None:
        self._dataset, self._seed, self._batch_size = dataset, seed, batch_size
        self._total = lru_cache(maxsize=2)(self._weight_of_batch)

    def _read(
        self, stage: int, step: int, first: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        numbers = step * self._batch_size + np.arange(first, first + count, dtype=np.int64)
        return self._dataset.read(indices_of(self._seed, stage, numbers, self._dataset.num_examples))

    def _weight_of_batch(self, stage: int, step: int) -> float:
        _, _, weights = self._read(stage, step, 0, self._batch_size)
        return float(weights.sum(dtype=np.float64))

    def __call__(
        self, stage: int, step: int, first: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        tokens, targets, weights = self._read(stage, step, first, count)
        scale = 1.0 / max(1.0, self._total(stage, step))
        return tokens, targets, (weights * scale).astype(np.float32)
