from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetrain.data import Augmentation, Dataset, batch, to_float
from edgetrain.errors import UsageError


class Numbered(Dataset):
    """Example i is labelled i; its image is 1 in one corner, i at a place inside, and 0 elsewhere."""

    def __init__(self, num_examples: int) -> None:
        super().__init__("numbered", "train", num_examples, (1, 4, 4), [str(i) for i in range(num_examples)])

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images = np.zeros((len(indices), *self.image_shape), np.uint8)
        images[:, 0, 0, 0] = 1
        images[:, 0, 1, 2] = indices
        return images, indices.astype(np.int64)


def _batch(dataset: Dataset, **changed: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    arguments: dict[str, Any] = {
        "seed": 7,
        "stage": 0,
        "step": 0,
        "batch_size": 32,
        "first": 0,
        "augmentation": Augmentation(),
    }
    arguments |= changed
    return batch(dataset, **{"count": arguments["batch_size"], **arguments})


def _bytes(images: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint((images + 1) * 127.5).astype(np.int64)


def test_to_float_covers_the_scale() -> None:
    scaled = to_float(np.array([[0, 51, 255]], np.uint8))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [[-1, -0.6, 1]], rtol=1e-6)


def test_images_and_labels_belong_together() -> None:
    images, labels = _batch(Numbered(100))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((32, 1, 4, 4), np.float32, (32,), np.int64)
    np.testing.assert_array_equal(_bytes(images)[:, 0, 1, 2], labels)


@pytest.mark.parametrize("sizes", [[32], [1] * 32, [5, 20, 7]])
def test_a_batch_does_not_depend_on_how_it_is_split(sizes: list[int]) -> None:
    dataset, augmentation = Numbered(50), Augmentation(shift=2, flip=True)
    whole = _batch(dataset, step=1, augmentation=augmentation)  # crosses from the first epoch into the second
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [
        _batch(dataset, step=1, augmentation=augmentation, first=int(first), count=count)
        for first, count in zip(starts, sizes, strict=True)
    ]
    for whole_array, part_arrays in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(whole_array, np.concatenate(part_arrays))


@pytest.mark.parametrize(("num_examples", "batch_size"), [(64, 32), (50, 32), (7, 32), (1, 4)])
def test_every_epoch_visits_every_example_once(num_examples: int, batch_size: int) -> None:
    steps = -(-3 * num_examples // batch_size)
    labels = [_batch(Numbered(num_examples), step=step, batch_size=batch_size)[1] for step in range(steps)]
    epochs = np.concatenate(labels)[: 3 * num_examples].reshape(3, num_examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_examples), (3, 1)))
    if num_examples > 5:
        assert len(np.unique(epochs, axis=0)) == 3


def test_stages_and_seeds_have_orders_of_their_own() -> None:
    dataset = Numbered(100)
    orders = [_batch(dataset, seed=seed, stage=stage)[1].tolist() for seed in (7, 8) for stage in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert _batch(dataset)[1].tolist() == orders[0]


def test_flip_mirrors_about_half_of_the_images() -> None:
    plain, _ = _batch(Numbered(200), batch_size=200)
    images, _ = _batch(Numbered(200), batch_size=200, augmentation=Augmentation(flip=True))
    flipped = (images == plain[..., ::-1]).all(axis=(1, 2, 3))
    kept = (images == plain).all(axis=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert 70 < flipped.sum() < 130
    np.testing.assert_array_equal(
        images, _batch(Numbered(200), batch_size=200, augmentation=Augmentation(flip=True))[0]
    )


def test_shift_moves_every_image_by_its_own_way_into_black() -> None:
    _, labels = _batch(Numbered(200), batch_size=200)
    images = _bytes(_batch(Numbered(200), batch_size=200, augmentation=Augmentation(shift=1))[0])[:, 0]
    moves = set()
    for image, label in zip(images, labels, strict=True):
        candidates = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                expected = np.zeros((4, 4), np.int64)
                expected[1 + down, 2 + right] = label
                if down >= 0 and right >= 0:
                    expected[down, right] = 1
                if (image == expected).all():
                    candidates.append((down, right))
        assert candidates or label in (0, 1)
        moves.update(candidates)
    assert len(moves) == 9


def test_a_shift_beyond_the_image_leaves_black() -> None:
    images, _ = _batch(Numbered(200), batch_size=200, augmentation=Augmentation(shift=40))
    assert (images[:150] == -1).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift": -1}, "shift is -1, not a whole number"),
        ({"shift": 1.5}, "shift is 1.5, not a whole number"),
        ({"shift": True}, "shift is True, not a whole number"),
        ({"flip": 1}, "flip is 1, not true or false"),
    ],
)
def test_augmentation_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augmentation(**values)
