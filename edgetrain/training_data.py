"""What a step of training is made of, as host arrays: pure functions of the counters. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.data import Augmentation, Dataset, batch
from edgetrain.data.batches import TextBatches
from edgetrain.randomness import Purpose, Stream, normal, uniform
from edgetrain.spec import Spec, TextModelSpec

Batches = Callable[[int, int, int, int], tuple[Any, Any]]
"""(stage, step, first, count) -> images (count, C, H, W) float32 in [-1, 1] and labels (count,)."""


def training_batches(spec: Spec, dataset: Any) -> Any:
    """Reads a spec's training batches from a data set of its kind, in the spec's order: ``Batches`` of images, with its
    augmentation, or ``TextBatches``."""
    if isinstance(spec.model, TextModelSpec):
        return TextBatches(dataset, spec.train.seed, spec.train.batch_size)
    return _image_batches(spec, dataset)


def _image_batches(spec: Spec, dataset: Dataset) -> Batches:
    augmentation = Augmentation(spec.images.shift, spec.images.flip)

    def read(block: int, step: int, first: int, count: int) -> tuple[Any, Any]:
        return batch(
            dataset,
            seed=spec.train.seed,
            stage=block,
            step=step,
            batch_size=spec.train.batch_size,
            first=first,
            count=count,
            augmentation=augmentation,
        )

    return read


def draw_labels(  # noqa: PLR0917
    spec: Spec, batches: Batches, block: int, step: int, first: int, count: int
) -> Mapping[str, NDArray[Any]]:
    """Of a classifier's block: images (count, C, H, W), labels (count,), sigma (count,) and eps (count, width)."""
    seed, width = spec.train.seed, spec.image_model.width
    images, labels = batches(block, step, first, count)
    uniforms = uniform(Stream(seed, Purpose.SIGMA, block, step), first, count)[:, 0]
    return {
        "images": images,
        "labels": labels,
        "sigma": np.array(spec.diffusion_blocks.noise.draw(block, uniforms.tolist()), np.float32),
        "eps": normal(Stream(seed, Purpose.NOISE, block, step), first, count, width),
    }
