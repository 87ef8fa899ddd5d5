"""The generator of images: its parts against formulas written here, training, sampling, and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import devices
from edgetrain.blockwise import build_modules
from edgetrain.cli.images import grid_of
from edgetrain.data import Dataset, to_float
from edgetrain.errors import UsageError
from edgetrain.image_sampling import ImageSampler, Output
from edgetrain.models import build_family, build_network
from edgetrain.models.base import Boundary
from edgetrain.models.dit import DenoisingNetwork, Head, denoised, training_loss, unpatch, weighted_errors
from edgetrain.models.vit import patch_pixels
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.parameters import block_shapes
from edgetrain.plan import StreamedChoice
from edgetrain.recipe import resolve, to_toml
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from edgetrain.training_data import NoisyBatches, training_batches
from tests import language_models as exact
from tests.block_sessions import complete, new_session, state, tensors, train_on

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


def small(**changes: Any) -> Spec:
    base = {
        "model.family": "dit", "model.width": 32, "model.depth": 4, "model.heads": 2, "model.patch": 2,
        "model.image_shape": [1, 8, 8], "model.num_classes": 10, "diffusion_blocks.num_blocks": 2,
        "diffusion_blocks.sigma_data": 0.75, "train.batch_size": 16, "train.micro_batch": 16, "train.steps": 60,
        "train.visit_steps": 20, "optimizer.lr": 5e-3,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


# ------------------------------------------------------------------------------------------------------- the parts


def test_unpatch_is_the_inverse_of_patches() -> None:
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    assert torch.equal(unpatch(patch_pixels(images, 4), (3, 8, 12), 4), images)


def test_the_presets_are_edms_noise_levels() -> None:
    for preset, sharing in (("calibrated", "private"), ("paper", "shared")):
        method = small(diffusion_blocks__preset=preset).diffusion_blocks
        assert (method.sigma_min, method.sigma_max, method.p_mean, method.p_std) == (0.002, 80.0, -1.2, 1.2)
        assert (method.skip, method.streams, method.gate, method.stem, method.head) == (True, 1, 0.0, sharing, sharing)
        assert method.uncertainty == (preset == "calibrated")
    assert resolve({"model": {"family": "dit", "image_shape": [1, 4, 4]}}).sigma_data == 0.5


@pytest.mark.parametrize("change", [{"streams": 2}, {"skip": False}])
def test_what_an_image_cannot_be_denoised_by(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="c_skip"):
        small(**{f"diffusion_blocks__{key}": value for key, value in change.items()})


def test_the_error_is_that_of_the_networks_output() -> None:
    """w(s) |D - y|^2 = |F - (y - c_skip z) / c_out|^2, since w(s) = 1 / c_out^2."""
    spec = small()
    generator = torch.Generator().manual_seed(0)
    y, eps, output = (torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    s, sd = sigma[:, None, None, None], spec.sigma_data
    z = y + s * eps
    norm = s**2 + sd**2
    target = (y - sd**2 / norm * z) / (s * sd / norm.sqrt())
    found = weighted_errors(spec, output, {"images": y, "eps": eps, "sigma": sigma})
    torch.testing.assert_close(found, (output - target).square().mean((1, 2, 3)))
    torch.testing.assert_close(denoised(spec, target, z, sigma), y)


@pytest.fixture
def given() -> tuple[Boundary, dict[str, Tensor]]:
    """What a head of ``small`` takes, and what it was made of."""
    generator = torch.Generator().manual_seed(0)
    images, eps = (torch.randn(16, 1, 8, 8, generator=generator) for _ in range(2))
    sigma = (torch.randn(16, generator=generator) * 1.2 - 1.2).exp()
    sigma[0], sigma[1] = 0.002, 80.0
    tokens, condition = torch.randn(16, 16, 32, generator=generator), torch.randn(16, 1, 32, generator=generator)
    return Boundary({"tokens": tokens}, {"condition": condition}), {"images": images, "eps": eps, "sigma": sigma}


def random_head(spec: Spec) -> Head:
    generator, head = torch.Generator().manual_seed(1), Head(spec.image_model, spec.diffusion_blocks.uncertainty)
    for parameter in reversed(list(head.parameters())):  # the uncertainty last: the others are the same without it
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return head


def test_errors_count_in_units_of_what_is_expected(given: tuple[Boundary, dict[str, Tensor]]) -> None:
    """e / exp(u) + u, u a Chebyshev series of ln sigma; its place 3 p_std from p_mean or beyond is 1 or -1."""
    boundary, batch = given
    spec = small()
    head = random_head(spec)
    place = ((np.log(batch["sigma"].numpy()) + 1.2) / 3.6).clip(-1, 1)
    u = np.polynomial.chebyshev.chebval(place, head.uncertainty.detach().numpy())
    errors = weighted_errors(spec, head(boundary), batch).detach().numpy()
    expected = (errors / np.exp(u) + u).sum() / 16
    assert training_loss(spec, head, boundary, batch).item() == pytest.approx(expected, rel=1e-5)
    assert np.abs(u).max() > 0.1


def test_what_is_expected_begins_at_the_error_of_saying_nothing(given: tuple[Boundary, dict[str, Tensor]]) -> None:
    """u = 0, whatever the level: the first gradients are those of plain errors."""
    boundary, batch = given
    losses, gradients = [], []
    for is_on in (True, False):
        spec = small(diffusion_blocks__uncertainty=is_on)
        head = random_head(spec)
        if is_on:
            head.uncertainty.data.zero_()
        losses.append(training_loss(spec, head, boundary, batch))
        gradients.append(torch.autograd.grad(losses[-1], head.readout.weight)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def noisy_batches(spec: Spec, digits: Dataset) -> NoisyBatches:
    return NoisyBatches(spec, training_batches(spec, digits), spec.diffusion_blocks.noise)


def test_a_draw_is_a_pure_function_that_parts_add_up_to(digits: Dataset) -> None:
    drawn = noisy_batches(small(), digits)
    whole, again = drawn.draw(1, 7, 0, 16), drawn.draw(1, 7, 0, 16)
    parts = [drawn.draw(1, 7, first, count) for first, count in ((0, 5), (5, 11))]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    assert not np.array_equal(whole["eps"], drawn.draw(1, 8, 0, 16)["eps"])


def test_a_tenth_of_the_classes_is_withheld(digits: Dataset) -> None:
    labels = np.concatenate([noisy_batches(small(), digits).draw(0, step, 0, 16)["labels"] for step in range(125)])
    assert 0.07 < (labels == 10).mean() < 0.13
    assert set(labels) == set(range(11))
    never = noisy_batches(small(model__class_dropout=0.0), digits)
    assert max(never.draw(0, step, 0, 16)["labels"].max() for step in range(20)) == 9


def test_blocks_draw_from_their_bands_and_the_whole_model_from_all(digits: Dataset) -> None:
    spec = small()
    batches = training_batches(spec, digits)
    schedule = spec.diffusion_blocks.noise
    for block in range(2):
        low, high = schedule.training_band(block)
        sigma = np.concatenate(
            [NoisyBatches(spec, batches, schedule).draw(block, s, 0, 16)["sigma"] for s in range(20)]
        )
        assert low <= sigma.min() < sigma.max() <= high
    network = DenoisingNetwork(resolve(_exact()), batches)
    sigma = np.concatenate([network.draw(step, 0, 16)["sigma"] for step in range(20)])
    edge = schedule.boundaries[1]
    assert 0.35 < (sigma < edge).mean() < 0.65


def _exact() -> dict[str, Any]:
    tables = tomllib.loads(to_toml(small()))
    tables["train"]["objective"] = "exact"
    return tables


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Session:
    return complete(tmp_path_factory.mktemp("dit") / "s", small(), digits).session


def test_the_first_loss_is_that_of_a_network_that_says_nothing(digits: Dataset, tmp_path: Path) -> None:
    """F = 0, from a zero-initialised readout; with sigma_data that of the data the weighted error is then 1."""
    spec = small(train__steps=1)
    summary = complete(tmp_path / "s", spec, digits).summary
    assert summary["loss"] == pytest.approx(1.0, abs=0.15)


def test_training_denoises(trained: Session, digits: Dataset, tmp_path: Path) -> None:
    untrained = new_session(tmp_path / "s", trained.spec)
    before, after = (
        ImageSampler(one, devices.open_device("cpu"), 64).errors(digits, 4) for one in (untrained, trained)
    )
    assert [one.block for one in after] == [0, 0, 1, 1]
    assert [one.sigma for one in after] == sorted((one.sigma for one in after), reverse=True)
    for old, new in zip(before, after, strict=True):
        assert new.mse < 0.95 * old.mse, (old, new)


def test_what_is_expected_comes_to_be_the_error(digits: Dataset, tmp_path: Path) -> None:
    spec = small(train__steps=150, train__visit_steps=150, diffusion_blocks__num_blocks=1, optimizer__lr=2e-2)
    session = complete(tmp_path / "s", spec, digits).session
    head = Head(spec.image_model, True)
    stage = stages_of_block(spec, 0)[-1]
    head.uncertainty.data.copy_(torch.from_numpy(tensors(session, stage, "weight")["uncertainty"]))
    for level in ImageSampler(session, devices.open_device("cpu"), 64).errors(digits, 6):
        place = torch.tensor([(np.log(level.sigma) + 1.2) / 3.6], dtype=torch.float32)
        assert head.log_expected(place).exp().item() == pytest.approx(level.weight * level.mse, rel=0.25)


def test_the_order_of_visits_changes_no_bit(trained: Session, digits: Dataset, tmp_path: Path) -> None:
    other = complete(tmp_path / "s", small(train__order="descending", train__visit_steps=7), digits)
    assert state(other.session) == state(trained)


def test_a_visit_changes_its_block_alone(digits: Dataset, tmp_path: Path) -> None:
    before = state(new_session(tmp_path / "s", small()))
    after = state(train_on(tmp_path / "s", digits, blocks=[1], visits=1).session)
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(name.startswith("block01") for name in changed)


@pytest.mark.parametrize("sharing", ["private", "shared", "frozen"])
def test_a_stem_and_what_is_expected_may_be_shared(sharing: str, digits: Dataset, tmp_path: Path) -> None:
    head = "shared" if sharing == "shared" else "private"
    changes = {"diffusion_blocks__stem": sharing, "diffusion_blocks__head": head}
    session = new_session(tmp_path / "s", small(**changes))
    before = state(session)
    after = state(train_on(tmp_path / "s", digits).session)
    stems = {name: after[name] != before[name] for name in before if "stem weight" in name}
    heads = {name: after[name] != before[name] for name in before if "head weight uncertainty" in name}
    assert bool(stems) == (sharing != "frozen")
    assert all(stems.values())
    assert len(heads) == (1 if head == "shared" else 2)
    assert all(heads.values())


def test_a_session_from_before_goes_on_by_plain_errors(tmp_path: Path) -> None:
    written = tomllib.loads(to_toml(small()))
    del written["diffusion_blocks"]["uncertainty"]
    old = resolve(written, is_complete=True)
    assert not old.diffusion_blocks.uncertainty
    assert "uncertainty" not in block_shapes(old)["head"]


def test_the_class_matters_to_every_block(trained: Session) -> None:
    sampler = ImageSampler(trained, devices.open_device("cpu"), 4)
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in range(2):
            output = sampler._load(block)
            one, other = (output(z, torch.full((4,), 0.5), torch.full((4,), label)) for label in (1, 10))
            assert (one - other).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------- sampling


class Knowing(ImageSampler):
    """Knows the image of each class, and is asked for F."""

    def __init__(self, session: Session, images: NDArray[np.float32]) -> None:
        super().__init__(session, devices.open_device("cpu"), 3)
        self.images = torch.from_numpy(images)
        self.loaded: list[int] = []

    def _load(self, block: int) -> Output:
        self.loaded.append(block)

        def output(z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            s, sd = sigma[:, None, None, None], self.spec.sigma_data
            norm = s**2 + sd**2
            return (self.images[labels] - sd**2 / norm * z) / (s * sd / norm.sqrt())

        return output


def known_images(digits: Dataset) -> NDArray[np.uint8]:
    """One for each class, and grey for none."""
    images, _ = digits.read(np.arange(11))
    images[10] = 128
    return images


def test_who_knows_the_image_makes_it(trained: Session, digits: Dataset) -> None:
    known = known_images(digits)
    sampler = Knowing(trained, to_float(known))
    made = sampler.generate([4, 0, 4, 9, 2], num_steps=5, guidance=1.0, seed=0)
    assert np.abs(made.astype(int) - known[[4, 0, 4, 9, 2]]).max() <= 1
    assert sampler.loaded == [0, 1], "each block once, from the highest noise down"


def test_guidance_goes_beyond_what_the_class_says(trained: Session, digits: Dataset) -> None:
    known = to_float(known_images(digits))
    made = Knowing(trained, known).generate([3], num_steps=4, guidance=1.5, seed=0)
    expected = np.clip(np.rint((known[10] + 1.5 * (known[3] - known[10]) + 1) * 127.5), 0, 255)
    assert np.abs(made[0].astype(int) - expected).max() <= 1


def test_images_depend_on_their_number_and_the_seed_alone(trained: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(labels: Sequence[int], seed: int = 0, batch: int = 8) -> NDArray[np.uint8]:
        return ImageSampler(trained, devices.open_device("cpu"), batch).generate(labels, 4, 2.0, seed)

    labels = [1, 2, 3, 4, 5, 6]
    first = made(labels)
    np.testing.assert_array_equal(first, made(labels))
    assert not np.array_equal(first, made(labels, seed=1))
    np.testing.assert_allclose(made([1, 2, 3], batch=8), first[:3], atol=1)
    monkeypatch.setattr(ImageSampler, "chunk_images", 4)
    np.testing.assert_allclose(made(labels, batch=3), first, atol=1)


def test_memory_that_runs_out_halves_the_batch(trained: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ImageSampler(trained, devices.open_device("cpu"), 8)
    expected = sampler.generate([1] * 8, 2, 1.0, 0)
    load = ImageSampler._load

    def scarce(self: ImageSampler, block: int) -> Output:
        output = load(self, block)

        def limited(z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            if len(z) > 2:
                raise MemoryError
            return output(z, sigma, labels)

        return limited

    monkeypatch.setattr(ImageSampler, "_load", scarce)
    np.testing.assert_allclose(sampler.generate([1] * 8, 2, 1.0, 0), expected, atol=1)
    assert sampler.batch_size == 2


def test_a_model_trained_as_a_whole_is_sampled_layer_by_layer(tmp_path: Path) -> None:
    spec = exact.make_spec("dit")
    exact.new_session(tmp_path / "s", spec)
    exact.advance(tmp_path / "s", StreamedChoice(2))
    session = Session.open(tmp_path / "s")
    sampler = ImageSampler(session, devices.open_device("cpu"), 2)
    z, sigma = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0.5, 3.0])
    labels = torch.tensor([1, 10])
    network = build_network(spec, None)
    weights = {(stage.name, name): values for stage, name, values in exact.tensors(session, "weight")}
    boundary = None
    with torch.no_grad():
        for unit in sampler._stages.units:
            module = network.build(unit.kind)
            for stage in unit.stages:
                for name, parameter in module.named_parameters():
                    parameter.copy_(torch.from_numpy(weights[stage.name, name]))
            if unit.kind == "stem":
                from edgetrain.models.dit import enter

                boundary = enter(spec, module, z, sigma, labels)
            elif unit.kind == "head":
                expected = module(boundary)
            else:
                boundary = network.layer(module, boundary)  # type: ignore[arg-type]
        torch.testing.assert_close(sampler._load(0)(z, sigma, labels), expected, rtol=0, atol=0)


def test_a_block_is_as_large_as_its_layers_and_no_codebook() -> None:
    spec = small()
    block = build_modules(spec, build_family(spec), 0)
    assert block.codebook is None
    assert len(block.modules) == 4
    assert diffusion_blocks(spec, lambda *_: None).guess == 1.0  # type: ignore[arg-type, return-value]


def test_the_grid_is_filled_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 3), np.uint8) + 1
    grid = grid_of(images, 2)
    assert grid.shape == (3 * 2 + 2 * 2, 2 * 3 + 2, 1)
    assert grid[0, 0, 0] == 1
    assert grid[0, 5, 0] == 2
    assert grid[4, 0, 0] == 3
    assert grid[8, 0, 0] == 5
    assert (grid[2:4] == 0).all()
    assert (grid[8:, 5:] == 0).all()


# ------------------------------------------------------------------------------------------------------- commands


def run(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    start = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"
    command = [sys.executable, "-c", start, *map(str, arguments), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == exit_code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("objective", ["diffusion_blocks", "exact"])
def test_from_a_recipe_to_a_grid(objective: str, tmp_path: Path) -> None:
    session, grid = tmp_path / "s", tmp_path / "grid.png"
    options = ["--recipe", "dit-digits", "--memory-budget", "400MiB", "--threads", 1]
    sizes = {
        "model.width": 32,
        "model.depth": 3,
        "train.steps": 4,
        "train.visit_steps": 2,
        "train.objective": objective,
    }
    changes = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    summary = run("train", session, *options, *changes)
    assert summary["status"] == "complete"
    assert summary["peak_bytes"] <= summary["budget_bytes"]
    results = run("evaluate", session, "--threads", 1)["results"]
    assert len(results) == 6
    assert all(row["metric"] == "mse" and 0 < row["value"] < 10 for row in results)
    made = run("generate", session, "--to", grid, "--classes", "3,7", "--count", 6, "--steps", 4, "--threads", 1)
    assert made["classes"] == [3, 7, 3, 7, 3, 7]
    assert made["peak_bytes"] <= made["budget_bytes"]
    first = grid.read_bytes()
    with Image.open(grid) as image:
        assert image.size == (2 * 8 + 2, 3 * 8 + 2 * 2)
    run("generate", session, "--to", grid, "--classes", "3,7", "--count", 6, "--steps", 4, "--threads", 1)
    assert grid.read_bytes() == first
    assert not list(tmp_path.glob("*.part"))
    refused = run("generate", session, "--to", grid, "--classes", "dress", exit_code=2)
    assert "no class 'dress'" in refused["message"]
    assert "--to" in run("generate", session, exit_code=2)["hint"]
    assert all(row["passed"] for row in run("export", session, "--to", tmp_path / "out")["parity"])


def test_the_recipes_say_the_deviation_of_their_data(digits: Dataset) -> None:
    images, _ = digits.read(np.arange(digits.num_examples))
    from edgetrain.recipe import load_recipe

    assert resolve(load_recipe("dit-digits")).sigma_data == pytest.approx(float(to_float(images).std()), abs=0.02)
