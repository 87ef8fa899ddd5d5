"""Generators of images as ONNX: each block computes what torch does, and the images are the session's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import devices
from edgetrain.data import Dataset
from edgetrain.errors import BadInput
from edgetrain.image_sampling import ImageSampler
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.spec import Spec
from exporters import parity
from exporters.image_runtime import ImageGenerator
from exporters.onnx import stage
from exporters.reference import compute
from exporters.runtime import Predictor, open_model
from tests.exporters.common import make_session
from tests.test_importing import run_cli

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "paper, colour": {"diffusion_blocks.preset": "paper", "model.image_shape": [3, 4, 6], "model.patch": 2},
    "one block": {"diffusion_blocks.num_blocks": 1},
    "exact": {"train.objective": "exact"},
    "neighbours, colour": {"model.neighbours": 2, "model.image_shape": [3, 4, 6], "model.patch": 2},
    "exact, neighbours": {"train.objective": "exact", "model.neighbours": 1, "model.patch": 2},
}


def spec_of(changes: dict[str, Any]) -> Spec:
    base = {
        "model": {"family": "dit", "width": 16, "depth": 3, "heads": 2, "patch": 4, "image_shape": [1, 8, 8],
                  "num_classes": 10},
        "diffusion_blocks": {"num_blocks": 2, "sigma_data": 0.7}, "train": {"micro_batch": 4, "seed": 3},
    }  # fmt: skip
    return resolve(base, changes)


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def session(request, tmp_path) -> Session:
    return make_session(tmp_path / "s", spec_of(request.param))


def exported(session: Session, to: Path) -> Path:
    with stage(session, to, False) as staged:
        staged.publish()
    return to


def test_each_block_denoises_as_torch_does(session, tmp_path):
    folder, spec = exported(session, tmp_path / "to"), session.spec
    shape = spec.image_model.image_shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, *shape, generator=generator)
    labels = torch.tensor([0, 4, spec.image_model.num_classes])
    sampler = ImageSampler(session, devices.open_device("cpu"), 3)
    for block in range(spec.num_blocks):
        with torch.no_grad():
            output = sampler._load(block)
            for sigma in (0.01, 0.7, 40.0):
                expected = sampler._denoised(output, z, sigma, labels.numpy()).numpy()
                model = open_model(folder / f"block{block:02d}.onnx", 1)
                given = {"z": z.numpy(), "sigma": np.full(3, sigma, np.float32), "labels": labels.numpy()}
                (found,) = model.run(["denoised"], given)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_parity_is_compared_on_the_way(session, tmp_path):
    with (tmp_path / "outputs").open("w+b") as file:
        made = compute(session, False, file.fileno(), None)
        with stage(session, tmp_path / "to", False) as staged:
            rows = parity.check(session.path, staged.folder, made, None)
            staged.publish()
    assert {row["output"] for row in rows} == {"denoised"}
    assert len(rows) == session.spec.num_blocks
    assert all(row["passed"] and row["batch_sizes"] == [2, 5] for row in rows)


def test_the_images_are_the_sessions(session, tmp_path):
    folder = exported(session, tmp_path / "to")
    labels = [3, 0, 9, 3, 5]
    sampler = ImageSampler(session, devices.open_device("cpu"), 2)
    for guidance in (1.0, 2.5):
        expected = sampler.generate(labels, 6, guidance, 4)
        found = ImageGenerator(folder).generate(labels, 6, guidance, 4)
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert expected.std() > 1
    with pytest.raises(BadInput, match="edgetrain generate"):
        Predictor(folder)


def test_from_a_session_to_a_grid_without_torch(tmp_path):
    make_session(tmp_path / "s", spec_of({}))
    done = run_cli("export", tmp_path / "s", "--to", tmp_path / "to", "--memory-budget", "400MiB", "--json")
    assert done.returncode == 0, done.stderr
    grids = []
    for model in (tmp_path / "s", tmp_path / "to"):
        grid = tmp_path / f"{model.name}.png"
        more = ["--memory-budget", "400MiB", "--steps", 3, "--classes", "1,2", "--count", 4, "--json"]
        done = run_cli("generate", model, "--to", grid, *more)
        assert done.returncode == 0, done.stderr
        value = json.loads(done.stdout)
        grids.append(np.asarray(Image.open(grid)).astype(int))
    assert value["images"] == 4
    assert value["peak_bytes"] < 150 << 20
    assert np.abs(grids[0] - grids[1]).max() <= 1 and grids[0].std() > 1
    done = run_cli(
        "export", tmp_path / "s", "--to", tmp_path / "one", "--single-file", "--memory-budget", "400MiB", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert [row["output"] for row in json.loads(done.stdout)["parity"]] == ["images"]
    grid = ("--to", tmp_path / "one.png", "--classes", "1,2", "--count", 4)
    assert run_cli("generate", tmp_path / "one", *grid).returncode == 0
    done = run_cli("generate", tmp_path / "one", *grid, "--steps", 3)
    assert done.returncode == 2
    assert "takes 50 steps" in done.stderr


def test_one_graph_generates_what_the_session_does(session, tmp_path):
    """Fifty steps in a Loop, each by the block that an If chooses; any batch size, guidance as an input."""
    with stage(session, tmp_path / "to", True) as staged:
        staged.publish()
    kinds = [node.op_type for node in onnx.load(tmp_path / "to" / "model.onnx").graph.node]
    assert "Loop" in kinds and len(kinds) < 30
    labels = [3, 0, 9]
    sampler = ImageSampler(session, devices.open_device("cpu"), 2)
    for guidance in (1.0, 2.5):
        expected = sampler.generate(labels, 50, guidance, 4)
        found = ImageGenerator(tmp_path / "to").generate(labels, 50, guidance, 4)
        assert np.abs(found.astype(int) - expected).max() <= 1
    one = ImageGenerator(tmp_path / "to").generate(labels[:1], 50, 2.5, 4)
    np.testing.assert_array_equal(one, found[:1])


def test_errors_of_an_export_are_the_sessions(session: Session, tmp_path: Path) -> None:
    shape, num_classes = session.spec.image_model.image_shape, session.spec.image_model.num_classes
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (70, *shape)).astype(np.uint8)  # more than a batch

    class Images(Dataset):
        def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return pixels[indices], indices % num_classes

    dataset = Images("images", "test", len(pixels), shape, tuple(map(str, range(num_classes))))
    expected = ImageSampler(session, devices.open_device("cpu"), 16).errors(dataset, 3)
    found = ImageGenerator(exported(session, tmp_path / "to")).errors(dataset, 3)
    assert [sigma for sigma, _, _ in found] == pytest.approx([one.sigma for one in expected])
    if not session.spec.is_exact:
        assert [block for _, block, _ in found] == [one.block for one in expected]
    assert [mse for _, _, mse in found] == pytest.approx([one.mse for one in expected], rel=1e-4)
    others = Images("others", "test", 4, shape, ("0", "1"))
    with pytest.raises(BadInput, match="2 classes"):
        ImageGenerator(tmp_path / "to").errors(others, 3)


def said(*arguments: object) -> dict[str, Any]:
    done = run_cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_evaluate_an_export(tmp_path: Path) -> None:
    made = ["--recipe", "dit-digits", "--memory-budget", "1GiB", "--steps", "1", "--set", "train.visit_steps=1"]
    said("train", tmp_path / "s", *made)
    said("export", tmp_path / "s", "--to", tmp_path / "to")
    of_session = said("evaluate", tmp_path / "s")["results"]
    of_export = said("evaluate", tmp_path / "to", "--data", "digits", "--memory-budget", "200MiB")
    assert [row["readout"] for row in of_export["results"]] == [row["readout"] for row in of_session]
    assert [row["value"] for row in of_export["results"]] == pytest.approx([r["value"] for r in of_session], rel=1e-3)
    assert of_export["peak_bytes"] <= 200 << 20
