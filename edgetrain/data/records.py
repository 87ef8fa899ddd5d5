"""Data sets of fixed-size records in plain files, with the labels in memory: one byte an example."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Dataset
from edgetrain.data.files import RandomFile
from edgetrain.errors import BadInput


@dataclass(frozen=True)
class Records:
    """A file with ``num_records`` images, the first at byte ``first_byte``, one every ``stride_bytes``."""

    file: RandomFile
    num_records: int
    first_byte: int
    stride_bytes: int


class RecordDataset(Dataset):
    """The records of one or more files, in order, each an image of ``image_shape`` with planes one by one."""

    def __init__(
        self,
        name: str,
        split: str,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str],
        *,
        records: Sequence[Records],
        labels: NDArray[np.uint8],
    ) -> None:
        super().__init__(name, split, len(labels), image_shape, class_names)
        self._records = records
        self._starts = [0, *accumulate(part.num_records for part in records)]
        self._labels = labels

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = self._labels[indices].astype(np.int64)
        images = np.empty((len(indices), prod(self.image_shape)), np.uint8)  # (n, C * H * W)
        for row in np.argsort(indices, kind="stable"):  # in the order of the file: a disk's head moves one way
            images[row] = self._image(int(indices[row]))
        return images.reshape(-1, *self.image_shape), labels

    def _image(self, index: int) -> NDArray[np.uint8]:
        number = bisect_right(self._starts, index) - 1
        part = self._records[number]
        offset = part.first_byte + (index - self._starts[number]) * part.stride_bytes
        return np.frombuffer(part.file.read(offset, prod(self.image_shape)), np.uint8)


def check_labels(path: Path, labels: NDArray[np.uint8], num_classes: int) -> None:
    """Raises BadInput if a label of the file at ``path`` is outside ``range(num_classes)``."""
    wrong = labels >= num_classes
    if wrong.any():
        example = int(wrong.argmax())
        raise BadInput(
            f"{path}: example {example} has label {labels[example]}, but there are {num_classes} classes, "
            f"0 to {num_classes - 1}",
            "Check that the files belong to the same data set, and copy or download them again.",
        )
