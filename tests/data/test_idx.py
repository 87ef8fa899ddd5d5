from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgetrain.data import open_dataset
from edgetrain.errors import BadInput, DiskError
from tests.data.files import COUNTS, IMAGES, LABELS, cyclic_labels, idx_bytes, random_images, write_idx


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_examples_in_the_order_asked_for(tmp_path: Path, compressed: bool, split: str) -> None:
    dataset = open_dataset(str(write_idx(tmp_path / "toy", compressed=compressed)), split, tmp_path / "scratch")
    assert (dataset.name, dataset.split, dataset.num_examples) == ("toy", split, COUNTS[split])
    assert (dataset.image_shape, dataset.num_classes) == ((1, 5, 4), 3)
    assert dataset.class_names == ("0", "1", "2")
    indices = np.array([17, 0, 19, 3, 3])
    images, labels = dataset.read(indices)
    np.testing.assert_array_equal(images[:, 0], random_images(COUNTS[split], 5, 4)[indices])
    np.testing.assert_array_equal(labels, indices % 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


def test_inflates_once_and_again_when_the_source_changed(tmp_path: Path) -> None:
    folder, scratch = write_idx(tmp_path / "toy", compressed=True), tmp_path / "scratch"
    open_dataset(str(folder), "train", scratch)
    before = {path.name: path.stat().st_mtime_ns for path in scratch.iterdir()}
    assert len(before) == 2
    open_dataset(str(folder), "train", scratch)
    assert {path.name: path.stat().st_mtime_ns for path in scratch.iterdir()} == before

    changed = random_images(COUNTS["train"], 5, 4, seed=1)
    (folder / f"{IMAGES['train']}.gz").write_bytes(gzip.compress(idx_bytes(changed)))
    images, _ = open_dataset(str(folder), "train", scratch).read(np.arange(2))
    np.testing.assert_array_equal(images[:, 0], changed[:2])


def test_a_plain_file_is_read_in_place(tmp_path: Path) -> None:
    open_dataset(str(write_idx(tmp_path / "toy")), "train", tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def test_an_incomplete_scratch_file_is_made_anew(tmp_path: Path) -> None:
    folder, scratch = write_idx(tmp_path / "toy", compressed=True), tmp_path / "scratch"
    open_dataset(str(folder), "train", scratch)
    for path in scratch.iterdir():
        os.truncate(path, 10)
    images, _ = open_dataset(str(folder), "train", scratch).read(np.arange(2))
    np.testing.assert_array_equal(images[:, 0], random_images(COUNTS["train"], 5, 4)[:2])


def _damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES["train"], lambda data: data[:-1], "truncated.*50x5x4, which makes 1016 bytes, and it has 1015"),
        (IMAGES["train"], lambda data: data + b"x", "too long.*1016 bytes, and it has 1017"),
        (IMAGES["train"], lambda data: data[:7], "truncated: its header has 7 of 16 bytes"),
        (IMAGES["train"], lambda data: b"", "truncated: its header has 0 of 16 bytes"),
        (IMAGES["train"], gzip.compress, "begins with 0x1f8b0800, not with 0x00000803"),
        (IMAGES["train"], lambda data: b"\0\0\x0d\3" + data[4:], "begins with 0x00000d03"),
        (IMAGES["train"], lambda data: data[:8] + b"\xff" * 8 + data[16:], "truncated.*50x4294967295x4294967295"),
        (IMAGES["train"], lambda data: data[:8] + bytes(4) + data[12:], "is empty: its header says 50x0x4"),
        (LABELS["train"], lambda data: idx_bytes(cyclic_labels(49, 3)), "50 images in .*, but 49 labels in"),
        (LABELS["train"], lambda data: idx_bytes(np.zeros(50, np.uint8)), "all labels are 0"),
        (LABELS["train"], lambda data: idx_bytes(random_images(50, 5, 4)), "begins with 0x00000803"),
        (
            LABELS["test"],
            lambda data: idx_bytes(cyclic_labels(20, 5)),
            "example 3 has label 3, but there are 3 classes",
        ),
        (IMAGES["test"], lambda data: idx_bytes(random_images(20, 6, 4)), "mixed size: .* has 4x5, .* has 4x6"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    folder = write_idx(tmp_path / "toy")
    _damage(folder / name, change)
    with pytest.raises(BadInput, match=message) as caught:
        open_dataset(str(folder), "test" if name.startswith("t10k") else "train", tmp_path)
    assert name in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-20], "truncated or damaged"),
        (lambda data: data[:5], "truncated or damaged"),
        (lambda data: data[:100] + bytes(100) + data[200:], "truncated or damaged"),
        (lambda data: b"no gzip at all", "no gzip file"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-3]), "should hold 1016 bytes.*and holds only 1013"),
        (lambda data: gzip.compress(gzip.decompress(data) + bytes(10**7)), "should hold 1016 bytes.*and holds more"),
    ],
)
def test_bad_gzip_files_leave_nothing_behind(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    folder, scratch = write_idx(tmp_path / "toy", compressed=True), tmp_path / "scratch"
    _damage(folder / f"{IMAGES['train']}.gz", change)
    with pytest.raises(BadInput, match=message):
        open_dataset(str(folder), "train", scratch)
    assert not [path for path in scratch.glob("*") if "images" in path.name]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "toy")
    (folder / LABELS["train"]).unlink()
    with pytest.raises(BadInput, match=r"neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte\.gz"):
        open_dataset(str(folder), "test", tmp_path)


def test_an_unreadable_file(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "toy")
    (folder / IMAGES["train"]).unlink()
    (folder / IMAGES["train"]).mkdir()
    with pytest.raises(BadInput, match=r"Cannot read .*train-images-idx3-ubyte: Is a directory"):
        open_dataset(str(folder), "train", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "toy")
    (folder / IMAGES["train"]).chmod(0)
    with pytest.raises(BadInput, match="Permission denied"):
        open_dataset(str(folder), "train", tmp_path)


def test_a_file_cut_off_while_in_use(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "toy")
    dataset = open_dataset(str(folder), "train", tmp_path)
    os.truncate(folder / IMAGES["train"], 500)
    dataset.read(np.arange(3))
    with pytest.raises(BadInput, match="truncated: 20 bytes wanted at offset 996, 0 are there"):
        dataset.read(np.array([0, 49]))


def test_a_full_disk_while_inflating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = write_idx(tmp_path / "toy", compressed=True), tmp_path / "scratch"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"Cannot inflate .*train-labels.*No space left on device"):
        open_dataset(str(folder), "train", scratch)
    assert list(scratch.iterdir()) == []


def test_a_scratch_folder_that_cannot_be_made(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "toy", compressed=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="Not a directory"):
        open_dataset(str(folder), "train", tmp_path / "file" / "scratch")
