"""Labelled images: read in bounded memory, in an order that is a function of counters. No torch here."""

from __future__ import annotations

from pathlib import Path

from edgetrain.data.base import Dataset
from edgetrain.data.batches import Augmentation, batch, load_image, to_float
from edgetrain.data.cifar import is_cifar_folder, open_cifar
from edgetrain.data.files import reading
from edgetrain.data.folder import ImageFolder
from edgetrain.data.idx import is_idx_folder, open_idx
from edgetrain.errors import BadInput, UsageError

__all__ = ["Augmentation", "Dataset", "batch", "load_image", "open_dataset", "to_float"]

DIGITS = "digits"
SPLITS = ("train", "test")

_DIGITS_FOLDER = Path(__file__).parent / "digits"
_FORMATS = (
    'Give "digits" for the embedded data set, or a folder with IDX files (MNIST family, plain or .gz), '
    "with the binary version of CIFAR-10 or CIFAR-100, or with images in one sub-folder per class."
)


def open_dataset(source: str, split: str, scratch: Path) -> Dataset:
    """One split of a data set, checked as far as its headers and labels tell.

    ``source`` is ``"digits"``, the digits that come with edgetrain, or the path of a folder: with IDX
    files, the binary version of CIFAR-10 or CIFAR-100, or images in class sub-folders, as ``ImageFolder``
    describes. A folder that is itself called digits is written ``./digits``. ``split`` is ``"train"`` or
    ``"test"``. Compressed files are inflated into the folder ``scratch``, once.

    Raises:
        BadInput: the data is missing, unreadable, of no known format, damaged or inconsistent.
        DiskError: there is no room in ``scratch``, or it is read-only.
        UsageError: there is no such split.
    """
    if split not in SPLITS:
        raise UsageError(f"{split!r} is no split of a data set", f"Write {' or '.join(SPLITS)}.")
    if source == DIGITS:
        return open_idx(_DIGITS_FOLDER, split, DIGITS, scratch)
    folder = Path(source).expanduser()
    with reading(folder):
        if not folder.exists():
            raise BadInput(f"There is no data at {folder}", _FORMATS)
        if not folder.is_dir():
            raise BadInput(f"{folder} is a file, not a folder", _FORMATS)
        name = folder.resolve().name
        if is_idx_folder(folder):
            return open_idx(folder, split, name, scratch)
        if is_cifar_folder(folder):
            return open_cifar(folder, split, name)
        if not any(entry.is_dir() for entry in folder.iterdir()):
            raise BadInput(f"{folder} holds no data of a known format", _FORMATS)
        return ImageFolder(folder, split, name)
