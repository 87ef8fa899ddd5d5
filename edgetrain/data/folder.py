"""A folder of images in one sub-folder per class."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Dataset
from edgetrain.data.images import SUFFIXES, image_shape, load_image
from edgetrain.errors import BadInput
from edgetrain.randomness import Purpose, Stream, permute

_TEST_FOLDERS = ("test", "val", "valid")
_TEST_FRACTION = 0.1
_SPLIT_STREAM = Stream(0, Purpose.SPLIT)
_MAX_CHECKED_FILES = 20_000  # so many headers are read in seconds


class ImageFolder(Dataset):
    """One split of the images in a folder.

    Layout: ``train/CLASS/*.png`` beside ``test/CLASS/*.png`` (``val`` and ``valid`` are read as ``test``), or
    ``CLASS/*.png``, in which case a tenth of the images is the test split: with all N images numbered by
    class and name, number ``permute(Stream(0, Purpose.SPLIT), i, N)`` is test example i for
    i < round(N / 10), at least one, and a training example for all other i.

    Every image has the size of the first one, and is grey or not as it is. Up to 20000 headers are read
    here to check that; each image is checked again when it is read. Names starting with a dot are skipped.

    Raises:
        BadInput: there are fewer than two classes, a class or split is empty, a test class is not a training
            class, or an image is damaged or of another size.
    """

    def __init__(self, folder: Path, split: str, name: str) -> None:
        train_folder, test_folder = _split_folders(folder)
        class_names = _sub_folders(train_folder)
        if len(class_names) < 2:
            raise BadInput(
                f"{train_folder} has {len(class_names)} class folders; at least two are needed",
                "Put the images of each class into a folder of their own.",
            )
        if split == "test" and test_folder is not None:
            self._files = _list_test_files(test_folder, class_names)
        else:
            self._files = _list_train_files(train_folder, class_names)

        num_files = len(self._files)
        self._drawn = test_folder is None
        self._offset, num_examples = 0, num_files
        if self._drawn:
            num_test = max(1, round(num_files * _TEST_FRACTION))
            self._offset, num_examples = (0, num_test) if split == "test" else (num_test, num_files - num_test)

        # The training split's first image also for testing, so that the two splits fit the same model.
        self._reference = _first_image(train_folder, class_names)
        super().__init__(name, split, num_examples, image_shape(self._reference), class_names)
        if num_files <= _MAX_CHECKED_FILES:
            for number in range(num_files):
                self._check(self._files.path(number))

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        numbers = indices
        if self._drawn:
            numbers = permute(_SPLIT_STREAM, indices + self._offset, len(self._files))
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        for row, number in enumerate(numbers):
            path = self._files.path(int(number))
            self._check(path)  # before a large image is decoded
            images[row] = load_image(path, self.image_shape)
        return images, self._files.labels(numbers)

    def _check(self, path: Path) -> None:
        """Raises BadInput unless the image has the size and mode of all others, by its header."""
        channels, height, width = image_shape(path)
        expected_channels, expected_height, expected_width = self.image_shape
        if (height, width) != (expected_height, expected_width):
            what, expected, found = "size", f"{expected_width}x{expected_height}", f"{width}x{height}"
        elif channels != expected_channels:
            what, expected, found = "mode", *("grey" if c == 1 else "colour" for c in (expected_channels, channels))
        else:
            return
        raise BadInput(
            f"images of mixed {what}: {self._reference} is {expected}, {path} is {found}",
            "Convert them all to one size and mode first.",
        )


class _Files:
    """The image files of ``folder``, class by class: a byte string and an offset each, no objects."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder = folder
        self._class_names = class_names
        names, ends, class_starts = bytearray(), array("q", [0]), [0]
        for class_name in class_names:
            for name in _image_names(folder / class_name):
                names += os.fsencode(name)
                ends.append(len(names))
            class_starts.append(len(ends) - 1)
        self._names = bytes(names)
        self._ends = ends
        self.class_starts = np.array(class_starts, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def path(self, number: int) -> Path:
        name = os.fsdecode(self._names[self._ends[number] : self._ends[number + 1]])
        return self.folder / self._class_names[int(self.labels(np.array(number)))] / name

    def labels(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.class_starts, numbers, side="right").astype(np.int64) - 1


def _list_train_files(folder: Path, class_names: Sequence[str]) -> _Files:
    files = _Files(folder, class_names)
    for class_name, num_images in zip(class_names, np.diff(files.class_starts), strict=True):
        if not num_images:
            raise _no_images(folder / class_name)
    return files


def _list_test_files(folder: Path, class_names: Sequence[str]) -> _Files:
    unknown = sorted(set(_sub_folders(folder)) - set(class_names))
    if unknown:
        raise BadInput(f"{folder} has the class {unknown[0]!r}, the training data has not", "Name both alike.")
    files = _Files(folder, class_names)
    if not len(files):
        raise _no_images(folder)
    return files


def _split_folders(folder: Path) -> tuple[Path, Path | None]:
    """The folders of the training and the test classes, or (folder, None) where the test split is drawn.

    A class may be called "train": the folder of a split is known by having folders itself.
    """
    train = folder / "train"
    if not _sub_folders(train):
        return folder, None
    for name in _TEST_FOLDERS:
        if _sub_folders(folder / name):
            return train, folder / name
    raise BadInput(
        f"{folder} has train/ with class folders, but none of {', '.join(_TEST_FOLDERS)} with such",
        f"Add one, or give {train} itself: a tenth of it is then kept for testing.",
    )


def _sub_folders(folder: Path) -> list[str]:
    """Sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_names(folder: Path) -> list[str]:
    """Sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )


def _first_image(folder: Path, class_names: Sequence[str]) -> Path:
    for class_name in class_names:
        for name in _image_names(folder / class_name):
            return folder / class_name / name
    raise _no_images(folder)


def _no_images(folder: Path) -> BadInput:
    return BadInput(
        f"{folder} holds no images ({', '.join(SUFFIXES)})", "Put the images of each class into a folder of their own."
    )
