"""Reading a label out of trained blocks: the chain of Euler steps, and block 0 alone at sigma_max.

One block is resident at a time: a chunk of examples passes all its steps of a block before the next block is loaded.
What trained within a budget is sampled within it: without gradients and moments, in the batches of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from devices import Device
from devices.limits import is_out_of_memory, return_freed_memory
from edgetrain.blockwise import bind
from edgetrain.data import Dataset, to_float
from edgetrain.errors import BudgetBroken
from edgetrain.governor import Governor
from edgetrain.models import build_family
from edgetrain.models.base import Network
from edgetrain.models.codebook import enter, network_input, read_out
from edgetrain.models.vit import ClassifierNetwork, Stem, ViTLayer
from edgetrain.noise import euler_coefficients
from edgetrain.objectives.base import Block
from edgetrain.optim import warm_up_kernels
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.resident import Resident
from edgetrain.session import Session
from edgetrain.stages import Unit, exact_stages, largest_block
from edgetrain.units import format_bytes

CHUNK_BYTES = 2 << 20
"""What is held of all examples that pass a block together, their images included; far more work than a load."""
_WARM_UP_EXAMPLES = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Readout:
    """``projection``: how logits become a state again, by expectation ("soft") or by the likeliest row ("hard");
    ``draws``: how many noise draws are averaged, as probabilities; 0: the chain begins at the mode of the noise, z = 0,
    instead of a draw. ``steps = 0`` stops at sigma_max."""

    name: str
    steps: int
    projection: str = "soft"
    draws: int = 1


def readouts(num_blocks: int, steps: int | None, draws: int) -> list[Readout]:
    """The readouts that ``evaluate`` reports; the chain comes first."""
    n = steps or num_blocks
    rows = [Readout("chain", n), Readout("chain-mode", n, draws=0), Readout("chain-hard", n, "hard")]
    if draws > 1:
        rows += [
            Readout(f"chain-mean{draws}", n, "soft", draws),
            Readout(f"chain-hard-mean{draws}", n, "hard", draws),
        ]
    rows += [Readout("sigma_max", 0), Readout("sigma_max-mode", 0, draws=0)]
    if draws > 1:
        rows.append(Readout(f"sigma_max-mean{draws}", 0, "soft", draws))
    return rows


def accuracies(sampler: Sampler, dataset: Dataset, rows: list[Readout]) -> dict[str, float]:
    """Top-1 accuracy in per cent of each readout over the whole data set."""
    correct = {row.name: 0 for row in rows}
    steps = max(row.steps for row in rows) or sampler.spec.num_blocks
    chunk = sampler.chunk_examples(max(row.draws for row in rows))
    for start in range(0, dataset.num_examples, chunk):
        images, labels = dataset.read(np.arange(start, min(start + chunk, dataset.num_examples)))
        for projection, is_drawn in dict.fromkeys((row.projection, row.draws > 0) for row in rows):
            mine = [row for row in rows if (row.projection, row.draws > 0) == (projection, is_drawn)]
            draws = max(row.draws for row in mine)
            first, last = sampler.probabilities(images, start, steps, projection, draws)
            for row in mine:
                found = (last if row.steps else first)[: max(1, row.draws)].mean(0).argmax(1)
                correct[row.name] += int((found == labels).sum())
    return {name: 100.0 * count / dataset.num_examples for name, count in correct.items()}


class Batched:
    """Works on examples in batches of ``batch_size``, which memory that runs out halves."""

    device: Device
    batch_size: int

    @contextmanager
    def within(self, budget_bytes: int, doing: str) -> Iterator[None]:
        """Everything inside runs under the budget.

        Raises:
            BudgetBroken: it was exceeded, or ``doing`` needs more than it even with one example at a time.
        """
        governor = Governor(budget_bytes, self.device.memory)
        with governor.hold(CHUNK_BYTES):
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise BudgetBroken(
                    f"{doing} one at a time needs more than {format_bytes(budget_bytes)} of memory: {error}",
                    "Raise --memory-budget.",
                ) from error
        governor.check()

    def parts(self, n: int) -> Iterator[slice]:
        """The batches of ``n`` examples."""
        for start in range(0, n, self.batch_size):
            yield slice(start, min(start + self.batch_size, n))

    def halving(self, n: int, work: Callable[[], T]) -> T:
        """What ``work`` makes of ``n`` examples, tried again with half the batch from then on."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if self.batch_size == 1 or not is_out_of_memory(error):
                    raise
            return_freed_memory()
            self.batch_size = (min(self.batch_size, n) + 1) // 2


def bound(resident: Resident, session: Session, network: Network, unit: Unit) -> torch.nn.Module:
    """The module of a unit with its weights, which stay until others are bound."""
    with torch.device("meta"):
        module = network.build(unit.kind)
    resident.bind([(stage, session.layout(stage), module) for stage in unit.stages])
    resident.load(session.store.read)
    return module


class Sampler(Batched):
    """Denoises label embeddings with the blocks of a session."""

    def __init__(self, session: Session, device: Device, batch_size: int) -> None:
        self.session, self.device, self.batch_size = session, device, batch_size
        self.spec = session.spec
        self.family = build_family(self.spec)
        layouts = largest_block(self.spec, session.shapes)
        self.resident = Resident(device, [layouts], moments_resident=False, trains=False)

    def chunk_examples(self, draws: int) -> int:
        """How many examples ``probabilities`` is to get at once, for ``CHUNK_BYTES``."""
        model = self.spec.image_model
        floats = draws * (model.width + 2 * model.num_classes)
        return max(1, CHUNK_BYTES // (4 * floats + math.prod(model.image_shape)))

    def warm_up(self) -> None:
        """Touches the buffers and runs every operation once, so that the limit can be drawn around them."""
        self.resident.touch()
        images = np.zeros((_WARM_UP_EXAMPLES, *self.spec.image_model.image_shape), np.uint8)
        for projection in ("soft", "hard"):
            self.probabilities(images, 0, 1, projection, 1)
        warm_up_kernels(self.device)

    def probabilities(
        self, images: NDArray[np.uint8], first_example: int, num_steps: int, projection: str, draws: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Class probabilities (draws, n, classes) of the chain's first step, at sigma_max, and of its last. With no
        draws, those (1, n, classes) of the chain that begins at z = 0.

        Example i's noise is a function of the session's seed, i and the draw: the exported model draws the same.
        Where memory runs out, batches are half as large from then on.
        """
        return self.halving(len(images), lambda: self._chain(images, first_example, num_steps, projection, draws))

    @torch.no_grad()
    def _chain(
        self, images: NDArray[np.uint8], first_example: int, num_steps: int, projection: str, draws: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        spec, n = self.spec, len(images)
        grid = spec.diffusion_blocks.noise.grid(num_steps)
        chains = max(1, draws)
        z = np.zeros((chains, n, spec.image_model.width), np.float32)  # between two blocks
        first = np.empty((chains, n, spec.image_model.num_classes), np.float32)
        last = np.empty_like(first)
        for index in dict.fromkeys(block for _, block in grid):
            block = bind(self.resident, spec, self.session.shapes, self.family, index)
            self.resident.load(self.session.store.read)
            steps = [k for k, (_, owner) in enumerate(grid) if owner == index]
            for part in self.parts(n):
                x = torch.from_numpy(to_float(images[part])).to(self.device.torch_device)
                logits_at = self._denoiser(block, x)
                for draw in range(chains):
                    if draws and steps[0] == 0:
                        z[draw, part] = self._noise(draw, first_example + part.start, len(x))
                    state = torch.from_numpy(z[draw, part]).to(self.device.torch_device)
                    for k in steps:
                        sigma = grid[k][0]
                        logits = logits_at(state, torch.full((len(state),), sigma, device=state.device))
                        probabilities = logits.softmax(1)
                        if k == 0:
                            first[draw, part] = probabilities.cpu().numpy()
                        if k == num_steps - 1:
                            last[draw, part] = probabilities.cpu().numpy()
                        rows = block.rows
                        denoised = probabilities @ rows if projection == "soft" else rows[logits.argmax(1)]
                        a, b = euler_coefficients(sigma, grid[k + 1][0] if k + 1 < num_steps else 0.0)
                        state = a * state + b * denoised
                    z[draw, part] = state.cpu().numpy()
        return first, last

    def _noise(self, draw: int, first_example: int, count: int) -> NDArray[np.float32]:
        """Where the chain begins, (count, width): at sigma_max, of the norm that a noised row has."""
        stream = Stream(self.spec.train.seed, Purpose.EVALUATION_NOISE, 0, draw)
        scale = np.float32((1 + self.spec.diffusion_blocks.noise.sigma_max**2) ** 0.5)
        return scale * normal(stream, first_example, count, self.spec.image_model.width)

    def _denoiser(self, block: Block, images: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(z, sigma) -> logits for these images. Of two streams, that of the images runs once."""
        rows = block.rows
        if self.spec.diffusion_blocks.streams == 1:

            def single_stream(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                boundary = enter(self.spec, block.stem, rows, images, z, sigma)
                for layer in block.layers:
                    boundary = layer(boundary)
                return read_out(self.spec, block.head, rows, boundary, z, sigma)

            return single_stream
        stem, layers = cast(Stem, block.stem), cast(Sequence[ViTLayer], block.layers)
        boundary = stem.clean(images)
        clean, condition = boundary.carried["clean"], boundary.context["clean_condition"]
        seen = []
        for layer in layers:
            clean, own = layer.stream(clean, condition)
            seen.append(own)

        def noisy_stream(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            scaled_z, c_noise = network_input(self.spec, rows, z, sigma)
            boundary = stem.noised(scaled_z, c_noise)
            noisy, condition = boundary.carried["noisy"], boundary.context["condition"]
            for layer, own in zip(layers, seen, strict=True):
                noisy, _ = layer.stream(noisy, condition, own)
            return read_out(self.spec, block.head, rows, boundary.advance({"noisy": noisy}), z, sigma)

        return noisy_stream


class Classifier(Batched):
    """A classifier that exact training made: layer by layer, a chunk of examples through each."""

    def __init__(self, session: Session, device: Device, batch_size: int) -> None:
        self.session, self.device, self.batch_size = session, device, batch_size
        self.stages = exact_stages(session.spec)
        self.network = ClassifierNetwork(session.spec, None)
        units = [[session.layout(stage) for stage in unit.stages] for unit in self.stages.units]
        self.resident = Resident(device, units, moments_resident=False, trains=False)

    def warm_up(self) -> None:
        """Touches the buffers and runs every operation once, so that the limit can be drawn around them."""
        self.resident.touch()
        self.classes(np.zeros((_WARM_UP_EXAMPLES, *self.session.spec.image_model.image_shape), np.uint8))
        warm_up_kernels(self.device)

    def accuracy(self, dataset: Dataset) -> float:
        """Top-1 in per cent."""
        spec = self.session.spec.image_model
        chunk = max(1, CHUNK_BYTES // (4 * spec.width * (spec.num_patches + 1) + math.prod(spec.image_shape)))
        correct = 0
        for start in range(0, dataset.num_examples, chunk):
            images, labels = dataset.read(np.arange(start, min(start + chunk, dataset.num_examples)))
            correct += int((self.classes(images) == labels).sum())
        return 100.0 * correct / dataset.num_examples

    def classes(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The likeliest class of each image. Where memory runs out, batches are half as large from then on."""
        return self.halving(len(images), lambda: self._classes(images))

    @torch.no_grad()
    def _classes(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        parts = list(self.parts(len(images)))
        stem = self._load(self.stages.stem)
        boundaries = [
            self.network.enter(stem, {"images": torch.from_numpy(to_float(images[part])).to(self.device.torch_device)})
            for part in parts
        ]
        for unit in self.stages.layers:
            layer = self._load(unit)
            for i, boundary in enumerate(boundaries):
                boundaries[i] = self.network.layer(layer, boundary)
        head = self._load(self.stages.head)
        found = [self.network.logits(head, boundary).argmax(1).cpu().numpy() for boundary in boundaries]
        return np.concatenate(found)

    def _load(self, unit: Unit) -> torch.nn.Module:
        return bound(self.resident, self.session, self.network, unit)
