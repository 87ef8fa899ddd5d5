"""Images by a trained generator: Euler steps from noise, each by the block that owns its noise level.

One block is resident at a time, or of a model that exact training made one layer: all images pass all the steps of a
block before the next is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from devices import Device
from edgetrain.blockwise import bind
from edgetrain.data import Dataset, to_float
from edgetrain.models import build_family
from edgetrain.models.base import Boundary
from edgetrain.models.dit import DenoisingNetwork, denoised, enter
from edgetrain.noise import euler_coefficients, loss_weight
from edgetrain.optim import warm_up_kernels
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.resident import Resident
from edgetrain.sampling import CHUNK_BYTES, Batched, bound
from edgetrain.session import Session
from edgetrain.stages import Unit, exact_stages, largest_block

Output = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z, sigma, labels) -> F, shaped as z."""


@dataclass(frozen=True)
class Error:
    """How far the denoised images of one noise level are off: the mean square error of a pixel, and EDM's weight."""

    sigma: float
    block: int
    mse: float
    weight: float


class ImageSampler(Batched):
    """Denoises images with the blocks of a session."""

    def __init__(self, session: Session, device: Device, batch_size: int) -> None:
        self.session, self.device, self.batch_size = session, device, batch_size
        self.spec = session.spec
        self.schedule = self.spec.diffusion_blocks.noise
        if self.spec.is_exact:
            self._stages = exact_stages(self.spec)
            self._network = DenoisingNetwork(self.spec, None)
            units = [[session.layout(stage) for stage in unit.stages] for unit in self._stages.units]
        else:
            self._family = build_family(self.spec)
            units = [largest_block(self.spec, session.shapes)]
        self.resident = Resident(device, units, moments_resident=False, trains=False)

    @property
    def chunk_images(self) -> int:
        """How many images ``generate`` and ``errors`` take at once, for ``CHUNK_BYTES``."""
        return max(1, CHUNK_BYTES // (3 * 4 * int(np.prod(self.spec.image_model.image_shape))))

    def warm_up(self) -> None:
        """Touches the buffers and runs every operation once, so that the limit can be drawn around them."""
        self.resident.touch()
        self.generate([0], num_steps=2, guidance=2.0, seed=0)
        warm_up_kernels(self.device)

    def generate(self, labels: Sequence[int], num_steps: int, guidance: float, seed: int) -> NDArray[np.uint8]:
        """An image of each class in ``labels``, (n, C, H, W).

        ``guidance`` g denoises to D_u + g (D_c - D_u), with D_u that of no class (arXiv 2207.12598); 1 is without.
        Image i is a function of the weights, the seed, i, its label, the steps and the guidance alone.
        """
        starts = range(0, len(labels), self.chunk_images)
        parts = (partial(self._generate, labels, start, num_steps, guidance, seed) for start in starts)
        return np.concatenate([self.halving(len(labels), part) for part in parts])

    def errors(self, dataset: Dataset, num_levels: int) -> list[Error]:
        """The error at ``num_levels`` noise levels in the middle of equal parts of the probability, on all images.

        Example i's noise is a function of the session's seed, i and the level alone.
        """
        total = np.zeros(num_levels)
        levels = self.schedule.levels(num_levels)
        for start in range(0, dataset.num_examples, self.chunk_images):
            images, labels = dataset.read(np.arange(start, min(start + self.chunk_images, dataset.num_examples)))
            total += self.halving(len(images), partial(self._squares, to_float(images), labels, start, levels))
        pixels = dataset.num_examples * int(np.prod(self.spec.image_model.image_shape))
        return [
            Error(sigma, block, squares / pixels, loss_weight(sigma, self.spec.sigma_data))
            for (sigma, block), squares in zip(levels, total.tolist(), strict=True)
        ]

    @torch.no_grad()
    def _generate(
        self, labels: Sequence[int], start: int, num_steps: int, guidance: float, seed: int
    ) -> NDArray[np.uint8]:
        some, shape = labels[start : start + self.chunk_images], self.spec.image_model.image_shape
        grid = [*self.schedule.grid(num_steps), (0.0, -1)]
        scale = np.float32((1 + grid[0][0] ** 2) ** 0.5)
        stream = Stream(seed, Purpose.SAMPLING)
        z = scale * normal(stream, start, len(some), int(np.prod(shape))).reshape(len(some), *shape)
        classes = np.array(some, np.int64)
        nobody = np.full_like(classes, self.spec.image_model.num_classes)
        for block in dict.fromkeys(block for _, block in grid[:-1]):
            output = self._load(block)
            for (sigma, owner), (following, _) in itertools.pairwise(grid):
                if owner != block:
                    continue
                a, b = euler_coefficients(sigma, following)
                for part in self.parts(len(some)):
                    state = self._tensor(z[part])
                    found = self._denoised(output, state, sigma, classes[part])
                    if guidance != 1:
                        without = self._denoised(output, state, sigma, nobody[part])
                        found = without + guidance * (found - without)
                    z[part] = (a * state + b * found).cpu().numpy()
        return np.clip(np.rint((z + 1) * 127.5), 0, 255).astype(np.uint8)

    @torch.no_grad()
    def _squares(
        self, images: NDArray[np.float32], labels: NDArray[np.int64], start: int, levels: Sequence[tuple[float, int]]
    ) -> NDArray[np.float64]:
        """The summed square error of each level."""
        total = np.zeros(len(levels))
        for block in dict.fromkeys(block for _, block in levels):
            output = self._load(block)
            for number, (sigma, owner) in enumerate(levels):
                if owner != block:
                    continue
                stream = Stream(self.spec.train.seed, Purpose.EVALUATION_NOISE, 0, number)
                eps = normal(stream, start, len(images), images[0].size).reshape(images.shape)
                for part in self.parts(len(images)):
                    z = self._tensor(images[part] + np.float32(sigma) * eps[part])
                    error = self._denoised(output, z, sigma, labels[part]) - self._tensor(images[part])
                    total[number] += error.double().square().sum().item()
        return total

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device.torch_device)

    def _denoised(self, output: Output, z: Tensor, sigma: float, labels: NDArray[np.int64]) -> Tensor:
        """D (n, C, H, W) of z (n, C, H, W)."""
        sigmas = torch.full((len(z),), sigma, device=z.device)
        return denoised(self.spec, output(z, sigmas, self._tensor(labels)), z, sigmas)

    def _load(self, block: int) -> Output:
        """The network of a block, its weights resident until another one is loaded."""
        if self.spec.is_exact:
            return self._streamed
        modules = bind(self.resident, self.spec, self.session.shapes, self._family, block)
        self.resident.load(self.session.store.read)

        def output(z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            boundary = enter(self.spec, modules.stem, z, sigma, labels)
            for layer in modules.layers:
                boundary = layer(boundary)
            made: Tensor = modules.head(boundary)
            return made

        return output

    def _streamed(self, z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """F of a whole model, a layer at a time."""
        boundary: Boundary = enter(self.spec, self._module(self._stages.stem), z, sigma, labels)
        for unit in self._stages.layers:
            boundary = self._network.layer(self._module(unit), boundary)
        made: Tensor = self._module(self._stages.head)(boundary)
        return made

    def _module(self, unit: Unit) -> torch.nn.Module:
        return bound(self.resident, self.session, self._network, unit)
