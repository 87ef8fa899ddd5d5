"""Generates images with an exported generator and onnxruntime alone: no torch, one block in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data import Dataset, to_float
from edgetrain.errors import BadInput, UsageError
from edgetrain.noise import euler_coefficients
from edgetrain.randomness import Purpose, Stream, normal
from exporters.dit import OUTPUT, STEPS
from exporters.manifest import MODEL, Manifest, block_file
from exporters.runtime import model_errors, open_model

_BATCH = 64


class ImageGenerator:
    """An export, opened.

    Raises:
        BadInput: the folder is no export of a generator, or a damaged one.
    """

    def __init__(self, folder: Path, num_threads: int = 1) -> None:
        self.manifest = Manifest.read(folder)
        if self.manifest.family != "dit":
            raise BadInput(f"{folder} is an export of a classifier", "Use edgetrain predict.")
        self._folder, self._num_threads = folder, num_threads

    def generate(self, labels: Sequence[int], num_steps: int, guidance: float, seed: int) -> NDArray[np.uint8]:
        """An image of each class in ``labels``, (n, C, H, W), as ``ImageSampler.generate`` makes them."""
        shape = self.manifest.image_shape
        if self.manifest.single_file:
            return self._by_one_graph(labels, num_steps, guidance, seed)
        grid = [*self.manifest.schedule.grid(num_steps), (0.0, -1)]
        scale = np.float32((1 + grid[0][0] ** 2) ** 0.5)
        noise = normal(Stream(seed, Purpose.SAMPLING), 0, len(labels), int(np.prod(shape)))
        z = scale * noise.reshape(len(labels), *shape)
        classes = np.array(labels, np.int64)
        nobody = np.full_like(classes, self.manifest.num_classes)
        for block in dict.fromkeys(block for _, block in grid[:-1]):
            path = self._folder / block_file(block)
            model = open_model(path, self._num_threads)
            for (sigma, owner), (following, _) in itertools.pairwise(grid):
                if owner != block:
                    continue
                a, b = (np.float32(one) for one in euler_coefficients(sigma, following))
                for start in range(0, len(labels), _BATCH):
                    part = slice(start, start + _BATCH)
                    given = {"z": z[part], "sigma": np.full(len(z[part]), sigma, np.float32)}
                    with model_errors(path):
                        (found,) = model.run([OUTPUT], given | {"labels": classes[part]})
                        if guidance != 1:
                            (without,) = model.run([OUTPUT], given | {"labels": nobody[part]})
                            found = without + np.float32(guidance) * (found - without)
                    z[part] = a * z[part] + b * found
            del model  # before the next one is loaded
        return _pixels(z)

    def errors(self, dataset: Dataset, num_levels: int) -> list[tuple[float, int, float]]:
        """(sigma, block, mean square error of a denoised pixel) at so many noise levels, on all images: what
        ``ImageSampler.errors`` finds of the session, by the same noise.

        Raises:
            UsageError: the export is one graph, which denoises by all its steps at once.
            BadInput: the images are others than those of training.
        """
        manifest = self.manifest
        if manifest.single_file:
            raise UsageError(f"the one graph in {self._folder} takes all steps at once", "Export blocks.")
        if (dataset.image_shape, dataset.num_classes) != (manifest.image_shape, manifest.num_classes):
            raise BadInput(
                f"{dataset.name} has {dataset.num_classes} classes of images {dataset.image_shape}, the model was "
                f"trained on {manifest.num_classes} of {manifest.image_shape}"
            )
        levels = manifest.schedule.levels(num_levels)
        total = np.zeros(num_levels)
        for block in dict.fromkeys(block for _, block in levels):
            path = self._folder / block_file(block)
            model = open_model(path, self._num_threads)
            for start in range(0, dataset.num_examples, _BATCH):
                pixels, labels = dataset.read(np.arange(start, min(start + _BATCH, dataset.num_examples)))
                images = to_float(pixels)
                for number, (sigma, owner) in enumerate(levels):
                    if owner != block:
                        continue
                    stream = Stream(manifest.seed, Purpose.EVALUATION_NOISE, 0, number)
                    eps = normal(stream, start, len(images), images[0].size).reshape(images.shape)
                    z, sigmas = images + np.float32(sigma) * eps, np.full(len(images), sigma, np.float32)
                    with model_errors(path):
                        (found,) = model.run([OUTPUT], {"z": z, "sigma": sigmas, "labels": labels})
                    total[number] += np.square(found - images, dtype=np.float64).sum()
            del model  # before the next one is loaded
        count = dataset.num_examples * int(np.prod(manifest.image_shape))
        return [(sigma, block, squares / count) for (sigma, block), squares in zip(levels, total.tolist(), strict=True)]

    def _by_one_graph(self, labels: Sequence[int], num_steps: int, guidance: float, seed: int) -> NDArray[np.uint8]:
        if num_steps != STEPS:
            raise UsageError(
                f"the one graph in {self._folder} takes {STEPS} steps", "Leave --steps out, or export blocks."
            )
        path, shape = self._folder / MODEL, self.manifest.image_shape
        noise = normal(Stream(seed, Purpose.SAMPLING), 0, len(labels), int(np.prod(shape)))
        noise, classes = noise.reshape(len(labels), *shape), np.array(labels, np.int64)
        model, made = open_model(path, self._num_threads), []
        for start in range(0, len(labels), _BATCH):
            part = slice(start, start + _BATCH)
            given = {"noise": noise[part], "labels": classes[part], "guidance": np.array(guidance, np.float32)}
            with model_errors(path):
                made += model.run(["images"], given)
        return _pixels(np.concatenate(made))


def _pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """From about [-1, 1]."""
    found: NDArray[np.uint8] = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)
    return found
