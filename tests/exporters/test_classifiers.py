"""Classifiers trained as a whole, as ONNX: the logits that torch computes, whatever trains of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import devices
from edgetrain.data import to_float
from edgetrain.errors import UsageError
from edgetrain.recipe import resolve
from edgetrain.sampling import Classifier
from edgetrain.session import Session
from exporters import parity
from exporters.onnx import stage
from exporters.reference import compute
from exporters.runtime import Predictor
from tests.exporters.common import SMALL, export, make_session

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "last": {"exact.train": "last"},
    "colour": {"model.image_shape": [3, 4, 6], "model.patch": 2, "model.mlp_ratio": 3},
    "neighbours": {"model.image_shape": [3, 4, 6], "model.patch": 2, "model.neighbours": 1},
}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    return make_session(tmp_path / "s", resolve(SMALL, {"train.objective": "exact", **request.param}))


@pytest.mark.parametrize("single_file", [False, True])
def test_it_predicts_what_the_session_does(session: Session, tmp_path: Path, single_file: bool) -> None:
    predictor = Predictor(export(session, tmp_path / "e", single_file))
    shape = session.spec.image_model.image_shape
    pixels = np.random.default_rng(0).integers(0, 256, (40, *shape)).astype(np.uint8)
    expected = Classifier(session, devices.open_device("cpu", tmp_path), 16).classes(pixels)
    found = predictor.predict(to_float(pixels), 0)
    assert found.probabilities.argmax(1).tolist() == expected.tolist()
    assert found.probabilities.std(0).max() > 1e-3, "or nothing depends on the image"
    np.testing.assert_array_equal(found.probabilities, found.sigma_max_probabilities)
    one = predictor.predict(to_float(pixels[:1]), 0).probabilities  # any batch size
    np.testing.assert_allclose(one, found.probabilities[:1], 1e-5, 1e-6)


@pytest.mark.parametrize("single_file", [False, True])
def test_parity_is_compared_on_the_way(session: Session, tmp_path: Path, single_file: bool) -> None:
    with (tmp_path / "outputs").open("w+b") as file:
        made = compute(session, single_file, file.fileno(), None)
        with stage(session, tmp_path / "to", single_file) as staged:
            rows = parity.check(session.path, staged.folder, made, None)
            staged.publish()
    (row,) = rows
    assert (row["output"], row["passed"], row["batch_sizes"]) == ("logits", True, [2, 5])
    assert row["max_abs"] < 1e-5


def test_there_is_no_chain_in_it(session: Session, tmp_path: Path) -> None:
    predictor = Predictor(export(session, tmp_path / "e"))
    images = np.zeros((1, *session.spec.image_model.image_shape), np.float32)
    for other in ({"num_steps": 2}, {"projection": "hard"}, {"draws": 1}):
        with pytest.raises(UsageError, match="trained as a whole"):
            predictor.predict(images, 0, **other)  # type: ignore[arg-type]
