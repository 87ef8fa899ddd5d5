"""CIFAR-10 and CIFAR-100 in their binary version: records of label bytes and a 3 x 32 x 32 image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Dataset
from edgetrain.data.files import RandomFile, reading
from edgetrain.data.records import RecordDataset, Records, check_labels
from edgetrain.errors import BadInput
from edgetrain.units import MIB

_IMAGE_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class _Variant:
    """A record is ``num_label_bytes`` labels, of which the last one counts, then the image."""

    folder_name: str
    files: dict[str, Sequence[str]]  # by split
    num_label_bytes: int
    num_classes: int
    names_file: str

    @property
    def record_bytes(self) -> int:
        return self.num_label_bytes + prod(_IMAGE_SHAPE)


_VARIANTS = (
    _Variant(
        "cifar-10-batches-bin",
        {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]},
        num_label_bytes=1,
        num_classes=10,
        names_file="batches.meta.txt",
    ),
    _Variant(
        "cifar-100-binary",
        {"train": ["train.bin"], "test": ["test.bin"]},
        num_label_bytes=2,  # coarse, fine
        num_classes=100,
        names_file="fine_label_names.txt",
    ),
)


def is_cifar_folder(folder: Path) -> bool:
    return _locate(folder) is not None


def open_cifar(folder: Path, split: str, name: str) -> Dataset:
    """One split of the data set in ``folder``, or in the sub-folder its archive unpacks to.

    Classes are named by the text file of the archive when it is there, otherwise by number.

    Raises:
        BadInput: there is no such data set, or a file is missing, unreadable, truncated or of another format.
    """
    found = _locate(folder)
    if found is None:
        raise BadInput(f"No CIFAR binary files in {folder}", "Give the folder that holds the .bin files.")
    variant, folder = found
    records, labels = [], []
    for file_name in variant.files[split]:
        part = _open_records(folder / file_name, variant)
        part_labels = _read_labels(part, variant)
        check_labels(part.file.path, part_labels, variant.num_classes)
        records.append(part)
        labels.append(part_labels)
    class_names = _class_names(folder, variant)
    return RecordDataset(name, split, _IMAGE_SHAPE, class_names, records=records, labels=np.concatenate(labels))


def _locate(folder: Path) -> tuple[_Variant, Path] | None:
    for variant in _VARIANTS:
        for place in (folder, folder / variant.folder_name):
            if any((place / name).exists() for names in variant.files.values() for name in names):
                return variant, place
    return None


def _open_records(path: Path, variant: _Variant) -> Records:
    file = RandomFile(path)
    num_records, rest = divmod(file.num_bytes, variant.record_bytes)
    if rest or not num_records:
        raise BadInput(
            f"{path} is truncated or no CIFAR-{variant.num_classes} file: its {file.num_bytes} bytes are "
            f"no whole number of records of {variant.record_bytes} bytes",
            "Copy or download it again; the binary version is wanted, not the one for Python or Matlab.",
        )
    return Records(file, num_records, variant.num_label_bytes, variant.record_bytes)


def _read_labels(records: Records, variant: _Variant) -> NDArray[np.uint8]:
    """One pass over the file in chunks, so that a wrong label is found before training and not amid it."""
    labels = np.empty(records.num_records, np.uint8)
    rows = MIB // records.stride_bytes
    for start in range(0, records.num_records, rows):
        num_rows = min(rows, records.num_records - start)
        chunk = records.file.read(start * records.stride_bytes, num_rows * records.stride_bytes)
        table = np.frombuffer(chunk, np.uint8).reshape(num_rows, records.stride_bytes)
        labels[start : start + num_rows] = table[:, variant.num_label_bytes - 1]
    return labels


def _class_names(folder: Path, variant: _Variant) -> list[str]:
    path = folder / variant.names_file
    if path.exists():
        with reading(path):
            names = path.read_text("utf-8", errors="replace").split()
        if len(names) == variant.num_classes:
            return names
    return [str(number) for number in range(variant.num_classes)]
