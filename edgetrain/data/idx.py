"""IDX files, the format of the MNIST family: big-endian sizes, then bytes. Plain or .gz."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Dataset
from edgetrain.data.files import RandomFile, first_bytes, inflate, is_compressed
from edgetrain.data.records import RecordDataset, Records, check_labels
from edgetrain.errors import BadInput

_PREFIXES = {"train": "train", "test": "t10k"}
_KINDS = {3: "images-idx3-ubyte", 1: "labels-idx1-ubyte"}  # by the number of dimensions
_UNSIGNED_BYTE = 0x08


def is_idx_folder(folder: Path) -> bool:
    return any(
        path.exists() for split in _PREFIXES for num_dims in _KINDS for path in _variants(folder, split, num_dims)
    )


def open_idx(folder: Path, split: str, name: str, scratch: Path) -> Dataset:
    """One split of the data set in ``folder``; as many classes as the training labels name.

    Raises:
        BadInput: a file is missing, unreadable, truncated or of another format, or they do not fit together.
        DiskError: a .gz file cannot be inflated into ``scratch``.
    """
    train_labels_path = _find(folder, "train", 1)
    train_labels = _read_labels(train_labels_path, scratch)
    num_classes = int(train_labels.max()) + 1
    if num_classes < 2:
        raise BadInput(f"{train_labels_path}: all labels are 0", "Training needs at least two classes.")

    images_path, labels_path = _find(folder, split, 3), _find(folder, split, 1)
    labels = train_labels if split == "train" else _read_labels(labels_path, scratch)
    check_labels(labels_path, labels, num_classes)
    num_images, height, width = _read_sizes(images_path, 3)
    if num_images != len(labels):
        raise BadInput(
            f"{num_images} images in {images_path}, but {len(labels)} labels in {labels_path}",
            "Check that the two files belong together.",
        )
    train_images_path = _find(folder, "train", 3)
    _, train_height, train_width = _read_sizes(train_images_path, 3)
    if (height, width) != (train_height, train_width):
        raise BadInput(
            f"images of mixed size: {train_images_path} has {train_width}x{train_height}, "
            f"{images_path} has {width}x{height}",
            "Check that the files belong to the same data set.",
        )
    records = Records(_open_array(images_path, 3, scratch), num_images, _header_bytes(3), height * width)
    class_names = [str(number) for number in range(num_classes)]
    return RecordDataset(name, split, (1, height, width), class_names, records=[records], labels=labels)


def _variants(folder: Path, split: str, num_dims: int) -> tuple[Path, Path]:
    """Where a file may be: plain, or compressed."""
    stem = f"{_PREFIXES[split]}-{_KINDS[num_dims]}"
    return folder / stem, folder / f"{stem}.gz"


def _find(folder: Path, split: str, num_dims: int) -> Path:
    plain, compressed = _variants(folder, split, num_dims)
    for path in (plain, compressed):  # plain first: nothing to inflate
        if path.exists():
            return path
    raise BadInput(
        f"{folder} has IDX files, but neither {plain.name} nor {compressed.name}",
        "The format has four files: images and labels, each for train and t10k.",
    )


def _header_bytes(num_dims: int) -> int:
    return 4 + 4 * num_dims


def _read_sizes(path: Path, num_dims: int) -> tuple[int, ...]:
    """The length of each dimension, by the header alone."""
    header = first_bytes(path, _header_bytes(num_dims))
    if len(header) < _header_bytes(num_dims):
        raise BadInput(
            f"{path} is truncated: its header has {len(header)} of {_header_bytes(num_dims)} bytes",
            "Copy or download it again.",
        )
    magic, *sizes = struct.unpack(f">{1 + num_dims}I", header)
    expected = _UNSIGNED_BYTE << 8 | num_dims
    if magic != expected:
        raise BadInput(
            f"{path} begins with 0x{magic:08x}, not with 0x{expected:08x}: "
            f"it is no IDX file of bytes with {num_dims} dimension{'s' if num_dims > 1 else ''}",
            "Check that it is what its name says; a file that is compressed must be named .gz, others must not.",
        )
    if 0 in sizes:
        raise BadInput(f"{path} is empty: its header says {'x'.join(map(str, sizes))}", "Download it again.")
    return tuple(sizes)


def _open_array(path: Path, num_dims: int, scratch: Path) -> RandomFile:
    """The file, inflated if need be, once its size has been found to be what its header says."""
    sizes = _read_sizes(path, num_dims)
    num_bytes = _header_bytes(num_dims) + prod(sizes)
    file = RandomFile(inflate(path, scratch, num_bytes) if is_compressed(path) else path)
    if file.num_bytes != num_bytes:
        state = "truncated" if file.num_bytes < num_bytes else "too long"
        raise BadInput(
            f"{path} is {state}: its header says {'x'.join(map(str, sizes))}, which makes {num_bytes} bytes, "
            f"and it has {file.num_bytes}",
            "Copy or download it again.",
        )
    return file


def _read_labels(path: Path, scratch: Path) -> NDArray[np.uint8]:
    file = _open_array(path, 1, scratch)
    return np.frombuffer(file.read(_header_bytes(1), file.num_bytes - _header_bytes(1)), np.uint8)
