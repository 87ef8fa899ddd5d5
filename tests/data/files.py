"""Small real data sets in the formats that edgetrain reads."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
COUNTS = {"train": 50, "test": 20}


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x800 | values.ndim, *values.shape) + values.tobytes()


def random_images(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def cyclic_labels(count: int, num_classes: int) -> NDArray[np.uint8]:
    return (np.arange(count) % num_classes).astype(np.uint8)


def write_idx(folder: Path, *, compressed: bool = False) -> Path:
    """COUNTS images of 5 x 4 pixels of ``random_images``, with labels 0, 1, 2, 0, ..."""
    folder.mkdir()
    for split, count in COUNTS.items():
        for name, values in (
            (IMAGES[split], random_images(count, 5, 4)),
            (LABELS[split], cyclic_labels(count, 3)),
        ):
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
            else:
                (folder / name).write_bytes(idx_bytes(values))
    return folder


def cifar_bytes(labels: NDArray[np.uint8], images: NDArray[np.uint8]) -> bytes:
    """``labels`` (n, label bytes) and ``images`` (n, 3, 32, 32) as records."""
    return np.concatenate([labels, images.reshape(len(images), -1)], axis=1).tobytes()


def write_cifar10(folder: Path) -> Path:
    """Seven images in each of six files; the seed of the images is the number of the file, 6 for the test."""
    folder.mkdir(parents=True)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    for seed, name in enumerate(names, 1):
        labels = cyclic_labels(7, 10)[:, None] + np.uint8(seed % 4)
        (folder / name).write_bytes(cifar_bytes(labels, random_images(7, 3, 32, 32, seed=seed)))
    return folder


def write_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """``pixels`` (H, W) or (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_image_folder(folder: Path, class_names: tuple[str, ...], count: int, *, channels: int = 1) -> Path:
    """``count`` images of 6 x 8 (width x height) in each class, every one in a grey of its own."""
    for number, class_name in enumerate(class_names):
        for image in range(count):
            shape = (8, 6) if channels == 1 else (8, 6, 3)
            write_image(folder / class_name / f"{image:02d}.png", np.full(shape, number * count + image, np.uint8))
    return folder
