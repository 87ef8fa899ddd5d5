"""Prediction with onnxruntime alone: the same numbers as the sampler's, and no trust in the folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import devices
from edgetrain.data import to_float
from edgetrain.errors import BadInput, UsageError
from edgetrain.sampling import Sampler
from edgetrain.session import Session
from exporters.runtime import Predictor
from tests.exporters.common import VARIANTS, export, make_session, run_python, small_spec

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8)).astype(np.uint8)
IMAGES = to_float(PIXELS)


SCHEDULE = asdict(small_spec().diffusion_blocks.noise)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("session") / "s", small_spec())


@pytest.fixture(scope="module")
def folder(session: Session) -> Path:
    return export(session, session.path.parent / "e")


@pytest.mark.parametrize("variant", ["calibrated", "paper"])
@pytest.mark.parametrize(
    ("num_steps", "projection", "draws"),
    [(2, "soft", 1), (2, "hard", 3), (1, "soft", 1), (5, "soft", 2), (3, "soft", 0)],
)
def test_predicts_what_evaluation_does(
    tmp_path: Path, variant: str, num_steps: int, projection: Any, draws: int
) -> None:
    session = make_session(tmp_path / "s", small_spec(VARIANTS[variant]))
    predictor = Predictor(export(session, tmp_path / "e"))
    found = predictor.predict(IMAGES, 17, num_steps=num_steps, projection=projection, draws=draws)
    sampler = Sampler(session, devices.open_device("cpu", tmp_path), 4)
    first, last = sampler.probabilities(PIXELS, 17, num_steps, projection, draws)
    np.testing.assert_allclose(found.probabilities, last.mean(0), 1e-4, 1e-5)
    np.testing.assert_allclose(found.sigma_max_probabilities, first.mean(0), 1e-4, 1e-5)


def test_noise_belongs_to_the_example(folder: Path) -> None:
    """However a data set is cut into chunks, an example's prediction is the same."""
    whole = Predictor(folder).predict(IMAGES, 5, draws=2).probabilities
    predictor = Predictor(folder)
    parts = [predictor.predict(IMAGES[i : i + 4], 5 + i, draws=2).probabilities for i in (0, 4, 8)]
    np.testing.assert_allclose(np.concatenate(parts), whole, 1e-5, 1e-6)
    other = predictor.predict(IMAGES, 6, draws=2).probabilities
    assert np.abs(other - whole).max() > 1e-3


def test_a_block_is_loaded_once_a_chunk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters import runtime

    loaded, open_model = [], runtime.open_model

    def counting(path: Path, num_threads: int) -> Any:
        loaded.append(path.name)
        return open_model(path, num_threads)

    monkeypatch.setattr(runtime, "open_model", counting)
    Predictor(folder).predict(IMAGES, 0, num_steps=8, draws=3)
    assert loaded == ["block00.onnx", "block01.onnx"]


def test_without_torch(folder: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from exporters.runtime import Predictor
predictor = Predictor(Path(sys.argv[1]))
print(predictor.predict(np.zeros((2, 1, 8, 8), np.float32), 0, projection="hard").probabilities.shape)
print("torch" in sys.modules, "onnxruntime" in sys.modules, "onnx" in sys.modules)
"""
    assert run_python(code, str(folder)).split() == ["(2,", "10)", "False", "True", "False"]


def test_a_single_file_runs_its_chain_only(session: Session, tmp_path: Path) -> None:
    predictor = Predictor(export(session, tmp_path / "e", single_file=True))
    assert predictor.predict(IMAGES, 0, num_steps=2).probabilities.shape == (9, 10)
    for other in ({"num_steps": 3}, {"projection": "hard"}):
        with pytest.raises(UsageError, match="runs 2 steps with soft projection"):
            predictor.predict(IMAGES, 0, **other)  # type: ignore[arg-type]


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(BadInput, match="images of shape"):
        Predictor(folder).predict(IMAGES[:, :, :4], 0)
    with pytest.raises(UsageError, match="at least one"):
        Predictor(folder).predict(IMAGES, 0, num_steps=0)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    for content in (None, b"", b"[]", b"{", b"\xff", b'{"format": "other", "version": 1}', b"[" * 100_000):
        if content is not None:
            (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(BadInput, match="is no export"):
            Predictor(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("width", "16"),
        ("image_shape", [1, 8]),
        ("image_shape", [1, 8, 0]),
        ("class_names", []),
        ("schedule", {}),
        ("schedule", [1]),
        ("schedule", SCHEDULE | {"p_std": float("nan")}),
        ("schedule", SCHEDULE | {"p_mean": 1e300}),
        ("schedule", SCHEDULE | {"num_blocks": 10**9}),
        ("files", {"../x": {"bytes": 1, "sha256": ""}}),
        ("files", None),
        ("version", 2),
    ],
)
def test_a_damaged_manifest(copy: Path, key: str, value: Any) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(BadInput, match=r"manifest\.json"):
        Predictor(copy)


def test_damaged_files(copy: Path) -> None:
    path = copy / "block01.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(BadInput, match=f"expected {len(data)} bytes"):
        Predictor(copy)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(BadInput, match=r"block01\.onnx cannot be run"):
        Predictor(copy).predict(IMAGES, 0)
    path.unlink()
    with pytest.raises(BadInput, match="is missing"):
        Predictor(copy)


def test_a_model_that_is_not_the_manifests(copy: Path) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(content | {"class_names": ["one", "two"]}))
    with pytest.raises(BadInput, match="does not compute what the manifest says"):
        Predictor(copy).predict(IMAGES, 0)
    with pytest.raises(BadInput, match=r"no codebook\.rows"):
        Predictor(copy).predict(IMAGES, 0, projection="hard")
