from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetrain.data import Augmentation, batch, open_dataset
from edgetrain.errors import BadInput, UsageError
from edgetrain.randomness import Purpose, Stream, permute
from tests.data.files import cyclic_labels, idx_bytes

FASHION_MNIST = Path(os.environ.get("EDGETRAIN_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def test_the_embedded_digits(tmp_path: Path) -> None:
    for split, count in (("train", 1437), ("test", 360)):
        dataset = open_dataset("digits", split, tmp_path)
        assert (dataset.name, dataset.num_examples, dataset.image_shape) == ("digits", count, (1, 8, 8))
        assert dataset.class_names == tuple("0123456789")
        images, labels = dataset.read(np.arange(count))
        shares = np.bincount(labels, minlength=10) / count
        assert shares.min() > 0.08
        assert shares.max() < 0.12
        assert set(np.unique(images)) <= {round(value * 255 / 16) for value in range(17)}


def test_the_digits_are_those_of_their_licence_file(tmp_path: Path) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    test = np.sort(permute(Stream(0, Purpose.SPLIT), np.arange(360), 1797))
    train = np.setdiff1d(np.arange(1797), test)
    for split, numbers in (("train", train), ("test", test)):
        images, labels = open_dataset("digits", split, tmp_path).read(np.arange(len(numbers)))
        np.testing.assert_array_equal(images[:, 0], np.rint(digits.images[numbers] * 255 / 16))
        np.testing.assert_array_equal(labels, digits.target[numbers])


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"There is no data at {tmp_path}/nowhere") as caught:
        open_dataset(str(tmp_path / "nowhere"), "train", tmp_path)
    for accepted in ("digits", "IDX", "CIFAR", "sub-folder per class"):
        assert accepted in caught.value.hint
    (tmp_path / "file.gz").write_bytes(b"")
    with pytest.raises(BadInput, match=r"file\.gz is a file, not a folder"):
        open_dataset(str(tmp_path / "file.gz"), "train", tmp_path)
    with pytest.raises(UsageError, match="'valid' is no split"):
        open_dataset("digits", "valid", tmp_path)


_IMPORTS = """
import sys
from pathlib import Path
import numpy as np
from edgetrain.data import open_dataset
open_dataset("digits", "train", Path(sys.argv[1])).read(np.arange(3))
print(*(name for name in ("torch", "PIL", "sklearn") if name in sys.modules))
"""

_PEAK = """
import sys
from pathlib import Path
import numpy as np
from edgetrain.data import Augmentation, batch, open_dataset

def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

batch(open_dataset("digits", "train", Path(sys.argv[1])), seed=0, stage=0, step=0, batch_size=8, first=0, count=8,
      augmentation=Augmentation(shift=2, flip=True))  # what is imported late is imported here
before = peak_kib()
dataset = open_dataset(sys.argv[1], "train", Path(sys.argv[1]))
for step in range(30):
    batch(dataset, seed=0, stage=0, step=step, batch_size=256, first=0, count=256,
          augmentation=Augmentation(shift=2, flip=True))
dataset.read(np.arange(dataset.num_examples - 256, dataset.num_examples))
print(dataset.num_examples, peak_kib() - before)
"""


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_neither_torch_nor_pillow_is_imported(tmp_path: Path) -> None:
    assert _python(_IMPORTS, str(tmp_path)) == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    num_images = 200_000_000 // 784
    header = idx_bytes(np.zeros((1, 28, 28), np.uint8))[:16]
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(header[:4] + num_images.to_bytes(4, "big") + header[8:])
    os.truncate(images, 16 + num_images * 784)  # sparse: takes no space
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(cyclic_labels(num_images, 10)))
    count, grown_kib = map(int, _python(_PEAK, str(tmp_path)).split())
    assert count == num_images
    assert grown_kib < 20_000


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no {FASHION_MNIST}: set EDGETRAIN_FASHION_MNIST")
def test_fashion_mnist(tmp_path: Path) -> None:
    for split, count in (("train", 60_000), ("test", 10_000)):
        dataset = open_dataset(str(FASHION_MNIST), split, tmp_path)
        assert (dataset.num_examples, dataset.image_shape, dataset.num_classes) == (count, (1, 28, 28), 10)
        _, labels = dataset.read(np.arange(count))
        np.testing.assert_array_equal(np.bincount(labels), [count // 10] * 10)
    images, labels = batch(
        open_dataset(str(FASHION_MNIST), "train", tmp_path),
        seed=0, stage=0, step=0, batch_size=2000, first=0, count=2000, augmentation=Augmentation(),
    )  # fmt: skip
    trousers, shirts = images[labels == 1].mean(axis=(0, 1)), images[labels == 0].mean(axis=(0, 1))
    assert images.mean() == pytest.approx(0.286 * 2 - 1, abs=0.02)  # the known mean of the data set
    assert trousers[14, 5] < -0.9 < shirts[14, 7]
