"""What a step of training is made of, as host arrays: pure functions of the counters. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.data import Augmentation, Dataset, batch
from edgetrain.data.batches import TextBatches
from edgetrain.masking import hidden, texts
from edgetrain.noise import NoiseSchedule, masking_band
from edgetrain.randomness import Purpose, Stream, normal, uniform
from edgetrain.spec import Spec, TextModelSpec

Batches = Callable[[int, int, int, int], tuple[Any, Any]]
"""(stage, step, first, count) -> images (count, C, H, W) float32 in [-1, 1] and labels (count,)."""

Draw = Callable[[int, int, int, int], Mapping[str, NDArray[Any]]]
"""(block, step, first, count) -> host arrays of examples ``first`` .. ``first + count - 1`` of the step's batch, by
name: a pure function of the counters."""


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


def block_draws(spec: Spec, batches: Any) -> Draw:
    """What diffusion_blocks draws for the spec's family, on ``training_batches`` of its data."""
    draws: dict[str, Callable[[], Draw]] = {
        "vit": lambda: partial(_labels, spec, batches),
        "dit": lambda: NoisyBatches(spec, batches, spec.diffusion_blocks.noise).draw,
        "masked": lambda: MaskedBatches(spec, batches, spec.num_blocks).draw,
    }
    return draws.get(spec.model.family, lambda: partial(_tokens, spec, batches))()


def guess(spec: Spec) -> float:
    """The loss of a block of such a model that knows nothing."""
    if spec.model.family == "dit":
        return 1.0  # of F = 0, where sigma_data is that of the data
    is_text = isinstance(spec.model, TextModelSpec)
    return math.log(max(2, spec.text_model.vocab_size if is_text else spec.image_model.num_classes))


def _labels(  # noqa: PLR0917
    spec: Spec, batches: Batches, block: int, step: int, first: int, count: int
) -> Mapping[str, NDArray[Any]]:
    """Of a classifier: images (count, C, H, W), labels (count,), sigma (count,) and eps (count, width)."""
    images, labels = batches(block, step, first, count)
    eps = normal(Stream(spec.train.seed, Purpose.NOISE, block, step), first, count, spec.image_model.width)
    sigma = _sigma(spec, spec.diffusion_blocks.noise, block, step, first, count)
    return {"images": images, "labels": labels, "sigma": sigma, "eps": eps}


def _tokens(  # noqa: PLR0917
    spec: Spec, batches: TextBatches, block: int, step: int, first: int, count: int
) -> Mapping[str, NDArray[Any]]:
    """Of next-token models: tokens, targets and weights (count, length), sigma (count,), eps (count, length, width)."""
    tokens, targets, weights = batches(block, step, first, count)
    width = spec.text_model.width
    eps = normal(Stream(spec.train.seed, Purpose.NOISE, block, step), first, count, tokens.shape[1] * width)
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "sigma": _sigma(spec, spec.diffusion_blocks.noise, block, step, first, count),
        "eps": eps.reshape(*tokens.shape, width),
    }


def _sigma(  # noqa: PLR0917
    spec: Spec, schedule: NoiseSchedule, block: int, step: int, first: int, count: int
) -> NDArray[np.float32]:
    """Noise levels (count,) of the block's band."""
    uniforms = uniform(Stream(spec.train.seed, Purpose.SIGMA, block, step), first, count)[:, 0]
    return np.array(schedule.draw(block, uniforms.tolist()), np.float32)


class NoisyBatches:
    """Of a generator of images.

    Args:
        batches: reads images and labels; the first argument is the block, with an order of its own.
        schedule: whose bands the noise levels are drawn from.
    """

    def __init__(self, spec: Spec, batches: Batches, schedule: NoiseSchedule) -> None:
        self.spec, self.batches, self.schedule = spec, batches, schedule

    def draw(self, block: int, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """images and eps (count, C, H, W), labels (count,), of which some are that of no class, and sigma (count,)."""
        seed, model = self.spec.train.seed, self.spec.image_model
        images, labels = self.batches(block, step, first, count)
        dropped = uniform(Stream(seed, Purpose.DROPOUT, block, step), first, count)[:, 0] < model.class_dropout
        eps = normal(Stream(seed, Purpose.NOISE, block, step), first, count, images[0].size)
        return {
            "images": images,
            "labels": np.where(dropped, model.num_classes, labels),
            "sigma": _sigma(self.spec, self.schedule, block, step, first, count),
            "eps": eps.reshape(images.shape),
        }


class MaskedBatches:
    """Of masked diffusion."""

    def __init__(self, spec: Spec, batches: TextBatches, num_blocks: int) -> None:
        self.spec, self.batches, self.num_blocks = spec, batches, num_blocks

    def draw(self, block: int, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """tokens, some of them masked, and targets, what they were, (count, length); t (count,) in the block's band,
        spread evenly over the batch; and the weights of targets (count, length), 1 / t where one is masked, divided by
        the number of tokens of the batch that count."""
        train = self.spec.train
        given, following, all_weights = self.batches(block, step, first, count)
        targets, weights = texts(given, following, all_weights)
        counts = weights > 0
        low, high = masking_band(self.num_blocks, block)
        offset = uniform(Stream(train.seed, Purpose.SIGMA, block, step), 0, 1)[0, 0]
        place = (offset + np.arange(first, first + count) / train.batch_size) % 1.0
        t = low + (high - low) * place
        draws = uniform(Stream(train.seed, Purpose.NOISE, block, step), first, count, targets.shape[1])
        is_masked = (draws < t[:, None]) & counts
        return {
            "tokens": hidden(targets, is_masked, self.spec.text_model.vocab_size),
            "targets": np.maximum(targets, 0),
            "t": t.astype(np.float32),
            "weights": (is_masked * weights / t[:, None]).astype(np.float32),
        }
