"""Data: damaged, lost, of another shape, found from anywhere."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.workplace import ROOT, commits, told_in_both, until
from tests.data.files import (
    IMAGES,
    LABELS,
    cyclic_labels,
    idx_bytes,
    random_images,
    write_idx,
    write_image,
    write_image_folder,
)
from tests.data.test_open import FASHION_MNIST


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def a_truncated_idx_file(folder: Path) -> list[str]:
    shortened(write_idx(folder) / IMAGES["train"])
    return [IMAGES["train"], "truncated", "50x5x4", "1016 bytes", "1009"]


def a_truncated_header(folder: Path) -> list[str]:
    (write_idx(folder) / IMAGES["train"]).write_bytes(b"\0\0\x08\x03\0\0")
    return [IMAGES["train"], "truncated", "6 of 16 bytes"]


def a_truncated_gz_file(folder: Path) -> list[str]:
    shortened(write_idx(folder, compressed=True) / f"{IMAGES['train']}.gz")
    return [f"{IMAGES['train']}.gz", "truncated or damaged", "gzip -t"]


def fewer_labels_than_images(folder: Path) -> list[str]:
    (write_idx(folder) / LABELS["train"]).write_bytes(idx_bytes(cyclic_labels(49, 3)))
    return ["50 images", "49 labels", LABELS["train"]]


def no_labels(folder: Path) -> list[str]:
    (write_idx(folder) / LABELS["train"]).unlink()
    return ["neither", LABELS["train"], "four files"]


def something_unreadable(folder: Path) -> list[str]:
    (write_idx(folder) / IMAGES["train"]).unlink()
    (folder / IMAGES["train"]).mkdir()
    return ["Cannot read", IMAGES["train"], "directory"]


def images_of_mixed_size(folder: Path) -> list[str]:
    write_image(write_image_folder(folder, ("a", "b"), 6) / "b" / "odd.png", np.zeros((8, 7), np.uint8))
    return ["mixed size", "6x8", "odd.png is 7x8"]


def a_damaged_image(folder: Path) -> list[str]:
    (write_image_folder(folder, ("a", "b"), 6) / "a" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return ["03.png", "replace or remove"]


def a_single_class(folder: Path) -> list[str]:
    write_image_folder(folder, ("a",), 6)
    return ["1 class folders", "two"]


def nothing_known(folder: Path) -> list[str]:
    folder.mkdir()
    return ["known format", "IDX"]


def nothing_there(folder: Path) -> list[str]:
    return ["no data at", folder.name]


@pytest.mark.parametrize(
    "damage",
    [
        a_truncated_idx_file, a_truncated_header, a_truncated_gz_file, fewer_labels_than_images, no_labels,
        something_unreadable, images_of_mixed_size, a_damaged_image, a_single_class, nothing_known, nothing_there,
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_leaves_nothing(place, tmp_path, damage):
    said = damage(tmp_path / "data")
    text = place.error(7, *place.train(tmp_path / "s", "--data", tmp_path / "data", "--set", "model.patch=1"))
    assert not [word for word in said if word.lower() not in text.lower()], text
    assert not (tmp_path / "s").exists()


def test_test_images_of_another_size(place, complete, tmp_path):
    (write_idx(tmp_path / "data") / IMAGES["test"]).write_bytes(idx_bytes(random_images(20, 4, 4)))
    text = place.fails(7, "evaluate", complete["session"], "--data", tmp_path / "data")
    assert "mixed size" in text
    assert "has 4x5" in text
    assert "has 4x4" in text


def plain_digits(folder: Path) -> Path:
    """The embedded digits as plain files."""
    folder.mkdir()
    for file in (ROOT / "edgetrain" / "data" / "digits").glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return folder


@pytest.mark.slow
def test_data_that_is_lost_amid_the_training(place, complete, tmp_path):
    data, path = plain_digits(tmp_path / "data"), tmp_path / "s"
    process = place.start(*place.train(path, "--data", data, "--json"))
    until(process, lambda: commits(path) > 1)
    images = (data / IMAGES["train"]).read_bytes()
    os.truncate(data / IMAGES["train"], 1000)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    told_in_both(7, out, err)
    assert f"{IMAGES['train']} is truncated" in err
    assert place.json("verify", path)["ok"]
    assert "truncated" in place.fails(7, "train", path, "--threads", 1)
    (data / IMAGES["train"]).write_bytes(images)
    assert place.json("train", path, "--threads", 1)["digest"] == complete["digest"]


def test_data_that_does_not_fit_the_session(place, session, tmp_path):
    for split in ("train", "test"):
        write_image_folder(tmp_path / "images" / split, ("a", "b"), 1)
    text = place.fails(7, "train", session, "--data", tmp_path / "images", "--steps", 200)
    assert "2 classes" in text
    assert place.json("status", session)["steps"] == 60


def test_data_is_found_from_any_folder(place, tmp_path):
    write_image_folder(place.folder / "images" / "train", ("cat", "dog"), 6)
    write_image_folder(place.folder / "images" / "test", ("cat", "dog"), 2)
    place.json(*place.train(tmp_path / "s", "--data", "images", "--visits", 1, "--set", "model.patch=1"))
    elsewhere = copy.copy(place)
    elsewhere.folder = tmp_path
    assert elsewhere.json("evaluate", "s", "--threads", 1)["results"]
    shutil.rmtree(place.folder / "images")
    elsewhere.json("export", "s", "--to", "model")
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["class_names"] == ["cat", "dog"]


def test_images_are_classified_chunk_by_chunk(place, complete, tmp_path):
    place.json("export", complete["session"], "--to", tmp_path / "model")
    image = tmp_path / "one.png"
    write_image(image, random_images(1, 8, 8)[0])
    few = place.json("predict", tmp_path / "model", *[image] * 256, "--threads", 1)
    many = place.json("predict", tmp_path / "model", *[image] * 3000, "--threads", 1)
    assert len(many["predictions"]) == 3000
    assert many["predictions"][0]["class"] == few["predictions"][0]["class"]
    assert many["peak_bytes"] - few["peak_bytes"] < 12 << 20


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no {FASHION_MNIST}: set EDGETRAIN_FASHION_MNIST")
def test_fashion_mnist_from_its_files_to_onnx(place, tmp_path):
    path, model = tmp_path / "s", tmp_path / "model"
    told = ["--recipe", "vit-fashion-mnist", "--data", FASHION_MNIST, "--memory-budget", "400MiB"]
    done = place.json("train", path, *told, "--steps", 150, "--set", "train.visit_steps=50")
    assert done["peak_bytes"] <= 400 << 20
    here = {row["readout"]: row["value"] for row in place.json("evaluate", path, "--draws", 1)["results"]}
    assert here["chain"] > 50
    place.json("export", path, "--to", model)
    there = {
        row["readout"]: row for row in place.json("predict", model, "--data", FASHION_MNIST, "--draws", 1)["results"]
    }
    assert there["chain"]["num_examples"] == 10_000
    assert there["chain"]["value"] == pytest.approx(here["chain"], abs=0.1)
