"""What a session begins with and what it draws stays what it was: everything that was trained before depends on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetrain.data import open_dataset
from edgetrain.recipe import resolve
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.stages import stages_of_block
from edgetrain.training_data import block_draws, training_batches
from tests.exporters.test_ort_training import new_session
from tests.text_families import Cycling, small

_IMAGES = {"model": {"width": 16, "depth": 2, "heads": 2, "patch": 4, "image_shape": [1, 8, 8], "num_classes": 10},
           "data": {"source": "digits"}, "diffusion_blocks": {"num_blocks": 2},
           "train": {"batch_size": 8, "micro_batch": 8}}  # fmt: skip
SPECS: dict[str, Spec] = {
    "vit": resolve(_IMAGES), "dit": resolve(_IMAGES, {"model.family": "dit"}),
    "dit, neighbours": resolve(_IMAGES, {"model.family": "dit", "model.neighbours": 1}),
    **{family: small(family, model__depth=2) for family in ("masked", "ar", "recurrent")},
}  # fmt: skip
KNOWN: dict[str, tuple[list[float], dict[str, float]]] = {
    "vit": (
        [10.773997, 108.287966, 263.539236, 0.0],
        {"images": 535.844808, "labels": 590.625, "sigma": 5.36758417, "eps": 198.738504},
    ),
    "dit": (
        [131.270998, 253.815017, 0.0],
        {"images": 535.844808, "labels": 590.625, "sigma": 0.569864536, "eps": 775.681823},
    ),
    "dit, neighbours": (
        [179.090488, 253.815017, 0.0],
        {"images": 535.844808, "labels": 590.625, "sigma": 0.569864536, "eps": 775.681823},
    ),
    "masked": (
        [421.049467, 555.570425, 0.0],
        {"tokens": 30602.3542, "targets": 18878.125, "t": 1.05755545, "weights": 0.164941571},
    ),
    "ar": (
        [26.2459091, 426.887768, 555.570425, 0.0],
        {"tokens": 18878.125, "targets": 19413.125, "weights": 0.0155707475, "sigma": 6.68351886, "eps": 4456.59927},
    ),
    "recurrent": (
        [26.2459091, 981.46138, 48.0253254, 546.061017, 536.244179, 532.858349],
        {"tokens": 18562.6042, "targets": 18116.8125, "weights": 0.0155707475, "sigma": 19.0728388, "eps": 4506.67111},
    ),
}
"""By family: the sums of squares of the weights of each stage of the last block, and of what is drawn for a step."""


@pytest.mark.parametrize("name", SPECS)
def test_weights_and_draws_are_known(name: str, tmp_path: Path) -> None:
    found = measured(SPECS[name], tmp_path)
    assert found[0] == pytest.approx(KNOWN[name][0], rel=1e-5)
    assert found[1] == pytest.approx(KNOWN[name][1], rel=1e-5)


def measured(spec: Spec, folder: Path) -> tuple[list[float], dict[str, float]]:
    session, last = new_session(folder / "s", spec), spec.num_blocks - 1
    weights = []
    for stage in stages_of_block(spec, last):
        layout = stage.layout(session.shapes)
        role = "weight" if stage.trained else "frozen"
        data = np.empty(layout.section_bytes(role), np.uint8)
        session.store.read(stage.name, role, data.data)
        weights.append(_squares(data.view(np.float32)))
    is_text = isinstance(spec.model, TextModelSpec)
    dataset = Cycling() if is_text else open_dataset("digits", "train", folder)
    draw = block_draws(spec, training_batches(spec, dataset))(last, 3, 0, 8)
    return weights, {key: _squares(array) for key, array in draw.items()}


def _squares(values: np.ndarray) -> float:
    """Which differ if two elements change places."""
    flat = values.astype(np.float64).reshape(-1)
    return float((flat**2 * (1 + np.arange(len(flat)) / len(flat))).sum())
