"""What every data set is to the rest of edgetrain: examples by number."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Dataset(abc.ABC):
    """One split of a labelled image data set, read at random.

    Attributes:
        name: what the data set is called in reports.
        split: ``"train"`` or ``"test"``.
        num_examples: length of the split, at least 1.
        num_classes: number of classes of the training split, which all splits share.
        image_shape: ``(channels, height, width)`` of every image.
        class_names: the name of each class.
    """

    def __init__(
        self,
        name: str,
        split: str,
        num_examples: int,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str],
    ) -> None:
        self.name = name
        self.split = split
        self.num_examples = num_examples
        self.num_classes = len(class_names)
        self.image_shape = image_shape
        self.class_names = tuple(class_names)

    @abc.abstractmethod
    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images ``(n, C, H, W)`` and labels ``(n,)`` of the examples at ``indices``, in their order.

        The arrays are the caller's to change. Memory: O(n). Safe to call from several threads.

        Raises:
            BadInput: a file can no longer be read, or does not hold what it should.
        """
