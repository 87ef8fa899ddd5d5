"""Blocks trained alone by denoising (Shing et al., arXiv 2506.14202): no gradient crosses a block border.

Of a classifier, what is noised is a unit row of a codebook, the embedding of the label, and of a language model that of
the next token; the loss is unweighted cross-entropy. Of a generator it is the image, and the loss EDM's weighted square
error. In masked diffusion tokens are masked instead, and the loss is MD4's weighted cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgetrain.activations import Activations
from edgetrain.models import dit
from edgetrain.models.base import Boundary
from edgetrain.models.codebook import enter, read_out
from edgetrain.models.masked import unmasking_loss
from edgetrain.models.text import cross_entropy
from edgetrain.objectives.base import Block, Objective
from edgetrain.spec import Spec
from edgetrain.training_data import block_draws, guess


def diffusion_blocks(spec: Spec, batches: Any) -> Objective:
    """The objective for the spec's family, on ``training_batches`` of its data."""
    objectives: dict[str, Callable[[Spec, Any], Objective]] = {
        "vit": DenoisedLabels, "dit": DenoisedImages, "masked": UnmaskedTokens, "ar": DenoisedTokens,
        "recurrent": DenoisedTokens,
    }  # fmt: skip
    return objectives[spec.model.family](spec, batches)


class _Drawn(Objective):
    """What all have in common."""

    def __init__(self, spec: Spec, batches: Any) -> None:
        self.spec = spec
        self._draw = block_draws(spec, batches)

    @property
    def guess(self) -> float:
        return guess(self.spec)

    def draw(self, block: int, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        return self._draw(block, step, first, count)


class DenoisedLabels(_Drawn):
    """The objective for the classifier."""

    def loss(self, block: Block, draw: Mapping[str, Tensor], activations: Activations) -> Tensor:
        method, labels = self.spec.diffusion_blocks, draw["labels"]
        rows = block.rows
        z = rows[labels] + draw["sigma"][:, None] * draw["eps"]  # (n, width)
        boundary = enter(self.spec, block.stem, rows, draw["images"], z, draw["sigma"])
        for layer in block.layers:
            boundary = activations.run(layer, boundary)
        logits = read_out(self.spec, block.head, rows, boundary, z, draw["sigma"])
        total = F.cross_entropy(logits, labels, reduction="sum")
        if method.auxiliary:
            auxiliary = block.head.auxiliary_logits(boundary)  # type: ignore[operator]
            total = total + method.auxiliary * F.cross_entropy(auxiliary, labels, reduction="sum")
        return total / self.spec.train.batch_size


class DenoisedImages(_Drawn):
    """The objective for the generator: each block denoises images at the noise levels of its band."""

    def loss(self, block: Block, draw: Mapping[str, Tensor], activations: Activations) -> Tensor:
        boundary = dit.enter(self.spec, block.stem, dit.noisy(draw), draw["sigma"], draw["labels"])
        for layer in block.layers:
            boundary = activations.run(layer, boundary)
        return dit.training_loss(self.spec, block.head, boundary, draw)


class DenoisedTokens(_Drawn):
    """The objective for language models that predict the next token: each position has a noisy row of its target."""

    def loss(self, block: Block, draw: Mapping[str, Tensor], activations: Activations) -> Tensor:
        method, sigma = self.spec.diffusion_blocks, draw["sigma"]
        rows = block.rows
        z = F.embedding(draw["targets"], rows) + sigma[:, None, None] * draw["eps"]
        boundary = enter(self.spec, block.stem, rows, draw["tokens"], z, sigma)
        for layer in block.layers:
            boundary = activations.run(layer, boundary)
        logits = read_out(self.spec, block.head, rows, boundary, z, sigma)
        total = cross_entropy(logits, draw["targets"], draw["weights"])
        if method.auxiliary:
            total = total + method.auxiliary * block.head.auxiliary_loss(boundary, draw)  # type: ignore[operator]
        return total


class UnmaskedTokens(_Drawn):
    """The objective for masked diffusion: each block unmasks at the t of its band."""

    def loss(self, block: Block, draw: Mapping[str, Tensor], activations: Activations) -> Tensor:
        boundary: Boundary = block.stem(draw["tokens"], draw["t"])
        for layer in block.layers:
            boundary = activations.run(layer, boundary)
        return unmasking_loss(block.head, boundary, draw)
