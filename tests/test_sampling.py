"""The chain of Euler steps against one written here, from the method's description."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import devices
from edgetrain import sampling
from edgetrain.blockwise import bind, build_modules
from edgetrain.data import Dataset, to_float
from edgetrain.models import build_family
from edgetrain.models.codebook import enter, read_out
from edgetrain.objectives.base import Block
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.sampling import Sampler, accuracies, readouts
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from tests.exporters.common import make_session, small_spec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(
    scope="module",
    params=[
        {"diffusion_blocks.num_blocks": 3, "model.depth": 5},
        {"diffusion_blocks.num_blocks": 3, "diffusion_blocks.preset": "paper"},
    ],
    ids=["calibrated", "paper"],
)
def session(request, tmp_path_factory) -> Session:
    """Random in every weight, so that nothing is hidden by a zero."""
    return make_session(tmp_path_factory.mktemp("sampling") / "s", small_spec(request.param))


def block_of(session: Session, index: int) -> Block:
    """The modules of a block with the weights that are in the session's files."""
    spec = session.spec
    block = build_modules(spec, build_family(spec), index)
    for stage, module in zip(stages_of_block(spec, index), block.modules, strict=True):
        layout, role = stage.layout(session.shapes), "weight" if stage.trained else "frozen"
        data = bytearray(layout.section_bytes(role))
        session.store.read(stage.name, role, memoryview(data))
        module.to_empty(device="cpu")
        for tensor in layout.tensors:
            values = np.frombuffer(data, np.float32, tensor.nbytes // 4, layout.offset(role, tensor.name))
            module.get_parameter(tensor.name).data.copy_(torch.from_numpy(values.reshape(tensor.shape).copy()))
    return block


def plain_logits(spec: Spec, block: Block, images: Tensor, z: Tensor, sigma: float) -> Tensor:
    sigma_data = spec.diffusion_blocks.sigma_data or 1 / math.sqrt(spec.model.width)
    norm = math.sqrt(sigma**2 + sigma_data**2)
    stem: Any = block.stem
    head: Any = block.head
    entering = z / norm
    if spec.diffusion_blocks.preconditioning == "discrete":
        rows: Any = block.codebook
        rows = rows.rows / rows.rows.norm(dim=1, keepdim=True)
        likelihood = torch.exp(-((z[:, None] - rows) ** 2).sum(2).double() / (2 * sigma**2))  # (n, classes)
        weights = (likelihood / likelihood.sum(1, keepdim=True)).float()
        entering = math.sqrt(spec.model.width) * (weights @ rows)
    boundary = stem(images, entering, torch.full((len(z),), math.log(sigma) / 4))
    for layer in block.layers:
        boundary = layer(boundary)
    output = head.network_output(boundary)
    if spec.diffusion_blocks.skip:
        output = sigma_data**2 / norm**2 * z + sigma * sigma_data / norm * output
    logits: Tensor = head(output, boundary.context["condition"])
    return logits


def plain_sigmas(spec: Spec, num_steps: int) -> list[float]:
    """Descending, equally spaced in the probability of ln(sigma)."""
    method = spec.diffusion_blocks
    dist = NormalDist(method.p_mean, method.p_std)
    low, high = dist.cdf(math.log(method.sigma_min)), dist.cdf(math.log(method.sigma_max))
    return [math.exp(dist.inv_cdf(q)) for q in np.linspace(high, low, num_steps)]


@torch.no_grad()
def plain_chain(
    session: Session, images: Any, first: int, num_steps: int, *, hard: bool, draw: int | None
) -> list[Tensor]:
    """Logits (n, classes) of each step; ``first`` is the number of the first example."""
    spec = session.spec
    x, sigmas = torch.from_numpy(to_float(images)), plain_sigmas(spec, num_steps)
    blocks = [block_of(session, index) for index in range(spec.num_blocks)]
    stream = Stream(spec.train.seed, Purpose.EVALUATION_NOISE, 0, draw or 0)
    z = (
        (draw is not None)
        * math.sqrt(1 + sigmas[0] ** 2)
        * torch.from_numpy(normal(stream, first, len(x), spec.model.width))
    )
    steps = []
    for k, sigma in enumerate(sigmas):
        # Block 0 owns the highest noise; a step on the border of two belongs to the lower.
        block: Any = blocks[min(spec.num_blocks - 1, k * spec.num_blocks // max(1, num_steps - 1))]
        logits = plain_logits(spec, block, x, z, sigma)
        rows = block.codebook.rows / block.codebook.rows.norm(dim=1, keepdim=True)
        denoised = rows[logits.argmax(1)] if hard else logits.softmax(1) @ rows
        a = (sigmas[k + 1] if k + 1 < num_steps else 0.0) / sigma
        z = a * z + (1 - a) * denoised
        steps.append(logits)
    return steps


@pytest.mark.parametrize("projection", ["soft", "hard"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_the_chain_step_by_step(session, digits, num_steps, projection):
    """Four steps over three blocks fall on the borders of the bands."""
    images, _ = digits.read(np.arange(5, 25))
    sampler = Sampler(session, devices.open_device("cpu"), batch_size=7)
    first, last = sampler.probabilities(images, 5, num_steps, projection, draws=2)
    for draw in range(2):
        steps = plain_chain(session, images, 5, num_steps, hard=projection == "hard", draw=draw)
        for found, logits in ((first[draw], steps[0]), (last[draw], steps[-1])):
            np.testing.assert_allclose(found, logits.softmax(1), rtol=1e-3, atol=1e-5)
            assert (found.argmax(1) == logits.argmax(1).numpy()).all()


class Few(Dataset):
    """The first examples of another data set."""

    def __init__(self, whole: Dataset) -> None:
        super().__init__("few", whole.split, 300, whole.image_shape, whole.class_names)
        self._whole = whole

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._whole.read(indices)


def test_accuracy_is_that_of_the_mean_over_draws(session, digits, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 64 << 10)
    images, labels = digits.read(np.arange(300))
    sampler = Sampler(session, devices.open_device("cpu"), batch_size=50)
    assert 50 < sampler.chunk_examples(3) < 150
    found = accuracies(sampler, Few(digits), readouts(3, None, 3))

    def accuracy(probabilities: Tensor) -> float:
        return 100 * float((probabilities.argmax(1).numpy() == labels).mean())

    begun, _, ended = (logits.softmax(1) for logits in plain_chain(session, images, 0, 3, hard=False, draw=None))
    expected = {"chain-mode": accuracy(ended), "sigma_max-mode": accuracy(begun)}
    for name, hard in (("chain", False), ("chain-hard", True)):
        draws = [plain_chain(session, images, 0, 3, hard=hard, draw=draw) for draw in range(3)]
        first, _, last = (torch.stack(logits).softmax(2) for logits in zip(*draws, strict=True))
        expected |= {name: accuracy(last[0]), f"{name}-mean3": accuracy(last.mean(0))}
        expected |= {"sigma_max": accuracy(first[0]), "sigma_max-mean3": accuracy(first.mean(0))}
    assert found == pytest.approx(expected, abs=0.01)
    assert len(set(found.values())) > 2, "or the readings could be mixed up"


@pytest.mark.parametrize("draws", [1, 32, 1 << 20])
def test_what_a_chunk_holds(session, draws):
    """Images, the state and two sets of probabilities; one example at least."""
    sampler = Sampler(session, devices.open_device("cpu"), batch_size=8)
    count = sampler.chunk_examples(draws)
    first, last = sampler.probabilities(np.zeros((2, 1, 8, 8), np.uint8), 0, 3, "soft", 2)
    each = draws * (4 * session.spec.model.width + (first.nbytes + last.nbytes) // 4) + 64
    assert count == 1 or count * each <= sampling.CHUNK_BYTES < (count + 1) * each


def test_a_chunk_is_seen_in_batches_from_the_noise_on(session, digits, monkeypatch):
    counts = []

    def counting(stream: Stream, first: int, count: int, size: int) -> np.ndarray:
        counts.append(count)
        return normal(stream, first, count, size)

    monkeypatch.setattr(sampling, "normal", counting)
    images, _ = digits.read(np.arange(20))
    Sampler(session, devices.open_device("cpu"), batch_size=7).probabilities(images, 0, 3, "soft", draws=2)
    assert sorted(counts) == [6, 6, 7, 7, 7, 7]


def test_where_memory_runs_out_batches_get_smaller(session, digits, monkeypatch):
    """Half as many at a time, from then on; with one at a time there is nothing left to give up."""
    images, _ = digits.read(np.arange(20))
    device = devices.open_device("cpu")
    expected = Sampler(session, device, batch_size=20).probabilities(images, 5, 3, "soft", draws=2)
    sampler, fitting = Sampler(session, device, batch_size=64), 5
    denoiser = sampler._denoiser

    def short_of_memory(block: Block, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        run = denoiser(block, images)

        def logits(z: Tensor, sigma: Tensor) -> Tensor:
            # Amid the chain: what an attempt has done must not count for the next.
            if sigma[0] < session.spec.diffusion_blocks.noise.sigma_max and len(z) > fitting:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return run(z, sigma)

        return logits

    monkeypatch.setattr(sampler, "_denoiser", short_of_memory)
    found = sampler.probabilities(images, 5, 3, "soft", draws=2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert sampler.batch_size == 5
    fitting = 0
    with pytest.raises(RuntimeError, match="allocate"):
        sampler.probabilities(images, 5, 3, "soft", draws=2)


def test_logits_are_those_of_training(session, digits):
    """Of two streams that of the images runs once, which changes no bit."""
    sampler = Sampler(session, devices.open_device("cpu"), batch_size=8)
    block = bind(sampler.resident, session.spec, session.shapes, sampler.family, 1)
    sampler.resident.load(session.store.read)
    images = torch.from_numpy(to_float(digits.read(np.arange(8))[0]))
    z, sigma = torch.randn(8, session.spec.model.width), torch.full((8,), 0.7)
    boundary = enter(session.spec, block.stem, block.rows, images, z, sigma)
    for layer in block.layers:
        boundary = layer(boundary)
    expected = read_out(session.spec, block.head, block.rows, boundary, z, sigma)
    with torch.no_grad():
        logits_at = sampler._denoiser(block, images)
        for _ in range(2):
            torch.testing.assert_close(logits_at(z, sigma), expected, rtol=0, atol=0)


def test_warming_up_leaves_the_results_alone(session, digits):
    images, _ = digits.read(np.arange(8))
    sampler = Sampler(session, devices.open_device("cpu"), batch_size=8)
    before = sampler.probabilities(images, 0, 3, "hard", draws=1)
    sampler.warm_up()
    np.testing.assert_array_equal(sampler.probabilities(images, 0, 3, "hard", draws=1), before)
