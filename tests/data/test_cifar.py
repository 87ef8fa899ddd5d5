from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgetrain.data import open_dataset
from edgetrain.errors import BadInput
from tests.data.files import cifar_bytes, cyclic_labels, random_images, write_cifar10


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_spans_its_files(tmp_path: Path, inside: str) -> None:
    write_cifar10(tmp_path / "cifar" / inside)
    dataset = open_dataset(str(tmp_path / "cifar"), "train", tmp_path)
    assert (dataset.name, dataset.num_examples, dataset.num_classes) == ("cifar", 35, 10)
    assert dataset.image_shape == (3, 32, 32)
    images, labels = dataset.read(np.array([34, 0, 6, 7]))
    expected = [random_images(7, 3, 32, 32, seed=seed)[row] for seed, row in ((5, 6), (1, 0), (1, 6), (2, 0))]
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(labels, [6 + 5 % 4, 1, 7, 2])

    test = open_dataset(str(tmp_path / "cifar"), "test", tmp_path)
    assert test.num_examples == 7
    np.testing.assert_array_equal(test.read(np.arange(7))[0], random_images(7, 3, 32, 32, seed=6))


def test_cifar100_has_fine_labels_and_their_names(tmp_path: Path) -> None:
    labels = np.stack([cyclic_labels(700, 20), cyclic_labels(700, 100)], axis=1)
    images = random_images(700, 3, 32, 32)
    (tmp_path / "train.bin").write_bytes(cifar_bytes(labels, images))  # over two of the reader's chunks
    dataset = open_dataset(str(tmp_path), "train", tmp_path)
    assert (dataset.num_examples, dataset.num_classes, dataset.class_names[99]) == (700, 100, "99")
    some = np.array([699, 25])
    np.testing.assert_array_equal(dataset.read(some)[0], images[some])
    np.testing.assert_array_equal(dataset.read(np.arange(700))[1], np.arange(700) % 100)

    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"class_{number}" for number in range(100)) + "\n")
    assert open_dataset(str(tmp_path), "train", tmp_path).class_names[99] == "class_99"


def test_bad_files(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "cifar")
    os.truncate(folder / "data_batch_2.bin", 3073 * 7 - 1)
    with pytest.raises(BadInput, match=r"data_batch_2\.bin is truncated.*21510 bytes.*records of 3073 bytes"):
        open_dataset(str(folder), "train", tmp_path)
    os.truncate(folder / "data_batch_2.bin", 0)
    with pytest.raises(BadInput, match=r"data_batch_2\.bin is truncated.* 0 bytes"):
        open_dataset(str(folder), "train", tmp_path)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(BadInput, match=r"Cannot read .*data_batch_2\.bin: No such file"):
        open_dataset(str(folder), "train", tmp_path)
    (folder / "test_batch.bin").write_bytes(cifar_bytes(np.array([[3], [10]], np.uint8), random_images(2, 3, 32, 32)))
    with pytest.raises(BadInput, match=r"test_batch\.bin: example 1 has label 10, but there are 10 classes"):
        open_dataset(str(folder), "test", tmp_path)
