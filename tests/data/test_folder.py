from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetrain.data import folder as folder_module
from edgetrain.data import load_image, open_dataset
from edgetrain.errors import BadInput
from edgetrain.randomness import Purpose, Stream, permute
from tests.data.files import write_image, write_image_folder


def _greys(source: Path, split: str) -> tuple[list[int], list[int]]:
    """The grey value and the label of each example, which ``write_image_folder`` made all different."""
    dataset = open_dataset(str(source), split, source)
    images, labels = dataset.read(np.arange(dataset.num_examples))
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist(), labels.tolist()


@pytest.mark.parametrize("test_folder", ["test", "val", "valid"])
def test_split_folders(tmp_path: Path, test_folder: str) -> None:
    write_image_folder(tmp_path / "train", ("cat", "ant", "bee"), 4)
    write_image(tmp_path / test_folder / "bee" / "z.png", np.full((8, 6), 200, np.uint8))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    dataset = open_dataset(str(tmp_path), "train", tmp_path)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert (dataset.num_examples, dataset.image_shape) == (12, (1, 8, 6))
    assert _greys(tmp_path, "train") == ([4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3], [0] * 4 + [1] * 4 + [2] * 4)
    assert _greys(tmp_path, "test") == ([200], [1])


def test_a_tenth_is_drawn_where_there_are_no_split_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ("a", "b", "train"), 20)  # "train" is a class: it has no folders inside
    train, train_labels = _greys(tmp_path, "train")
    test, test_labels = _greys(tmp_path, "test")
    assert (len(train), len(test)) == (54, 6)
    assert sorted(train + test) == list(range(60))
    assert [grey // 20 for grey in train + test] == train_labels + test_labels
    assert test == permute(Stream(0, Purpose.SPLIT), np.arange(6), 60).tolist()  # as documented, for good
    assert sorted(test) == [4, 27, 33, 42, 54, 56]


def test_formats_and_colours(tmp_path: Path) -> None:
    pixels = np.zeros((8, 6, 3), np.uint8)
    pixels[..., 2] = 255
    for number, suffix in enumerate((".png", ".bmp", ".WEBP", ".jpg", ".JPEG")):
        write_image(tmp_path / "ab"[number % 2] / f"{number}{suffix}", pixels)
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "a" / "alpha.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "a" / "palette.png")
    for split, count in (("train", 6), ("test", 1)):
        dataset = open_dataset(str(tmp_path), split, tmp_path)
        assert (dataset.num_examples, dataset.image_shape) == (count, (3, 8, 6))
        images, _ = dataset.read(np.arange(count))
        np.testing.assert_allclose(images, np.broadcast_to(pixels.transpose(2, 0, 1), images.shape), atol=6)


@pytest.mark.parametrize("max_checked_files", [20_000, 0])
def test_mixed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_checked_files: int) -> None:
    """Found when the data set is opened if it is small, otherwise when the image is read."""
    monkeypatch.setattr(folder_module, "_MAX_CHECKED_FILES", max_checked_files)
    write_image_folder(tmp_path, ("a", "b"), 3)

    def read_all() -> None:
        for split in ("train", "test"):
            dataset = open_dataset(str(tmp_path), split, tmp_path)
            assert max_checked_files == 0
            dataset.read(np.arange(dataset.num_examples))

    write_image(tmp_path / "b" / "01.png", np.zeros((28, 30), np.uint8))
    with pytest.raises(BadInput, match=r"images of mixed size: .*a/00\.png is 6x8, .*b/01\.png is 30x28"):
        read_all()
    write_image(tmp_path / "b" / "01.png", np.zeros((8, 6, 3), np.uint8))
    with pytest.raises(BadInput, match=r"images of mixed mode: .*a/00\.png is grey, .*b/01\.png is colour"):
        read_all()


def test_test_images_of_another_size(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", ("a", "b"), 2)
    write_image(tmp_path / "test" / "a" / "0.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(BadInput, match=r"train/a/00\.png is 6x8, .*test/a/0\.png is 9x9"):
        open_dataset(str(tmp_path), "test", tmp_path)


def test_damaged_images(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ("a", "b"), 3)
    path = tmp_path / "b" / "01.png"
    whole = np.random.default_rng(0).integers(0, 256, (8, 6), np.uint8)
    write_image(path, whole)
    os.truncate(path, path.stat().st_size - 30)  # the header is good, the pixels are not
    with pytest.raises(BadInput, match=r"b/01\.png is a damaged image"):
        for split in ("train", "test"):
            dataset = open_dataset(str(tmp_path), split, tmp_path)
            dataset.read(np.arange(dataset.num_examples))
    path.write_bytes(b"GIF89a, or something else")
    with pytest.raises(BadInput, match=r"b/01\.png is no PNG, JPEG, BMP or WebP image"):
        open_dataset(str(tmp_path), "train", tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [47, 20])  # Pillow itself warns at 48 pixels, and refuses them at 20
def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    write_image_folder(tmp_path, ("a", "b"), 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadInput, match=r"a/00\.png is too large an image"):
        open_dataset(str(tmp_path), "train", tmp_path)


def test_folders_without_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no data of a known format") as caught:
        open_dataset(str(tmp_path), "train", tmp_path)
    assert "IDX" in caught.value.hint
    write_image_folder(tmp_path, ("a",), 3)
    with pytest.raises(BadInput, match="has 1 class folders; at least two are needed"):
        open_dataset(str(tmp_path), "train", tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match=r"b holds no images \(\.png, \.jpg"):
        open_dataset(str(tmp_path), "train", tmp_path)


def test_split_folders_that_do_not_fit(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", ("a", "b"), 3)
    with pytest.raises(BadInput, match="none of test, val, valid"):
        open_dataset(str(tmp_path), "train", tmp_path)
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(BadInput, match="test holds no images"):
        open_dataset(str(tmp_path), "test", tmp_path)
    write_image_folder(tmp_path / "test", ("c",), 3)
    with pytest.raises(BadInput, match="test has the class 'c', the training data has not"):
        open_dataset(str(tmp_path), "test", tmp_path)


def test_load_image_fits_the_model(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    pixels = np.zeros((64, 32, 3), np.uint8)
    pixels[:32, :, 0] = 255  # the upper half red
    write_image(path, pixels)
    colour = load_image(path, (3, 8, 4))
    assert (colour.shape, colour.dtype) == ((3, 8, 4), np.uint8)
    assert (colour[0, 0] == 255).all()
    assert (colour[:, -1] == 0).all()
    grey = load_image(path, (1, 64, 32))
    assert grey.shape == (1, 64, 32)
    assert set(np.unique(grey)) == {0, 76}
    np.testing.assert_array_equal(load_image(path, (3, 64, 32)), pixels.transpose(2, 0, 1))
    with pytest.raises(BadInput, match=r"Cannot read .*none\.png: No such file"):
        load_image(tmp_path / "none.png", (1, 8, 8))


def test_shrinking_averages(tmp_path: Path) -> None:
    pixels = np.indices((64, 64)).sum(axis=0) % 2 * 255  # a chessboard
    write_image(tmp_path / "fine.png", pixels.astype(np.uint8))
    np.testing.assert_allclose(load_image(tmp_path / "fine.png", (1, 8, 8)), 127.5, atol=4)
