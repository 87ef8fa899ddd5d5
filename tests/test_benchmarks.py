"""What the comparisons of quality share: studies that go on where they were, scores, and splits. Trainings are real."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality
import quality_dit
import quality_parts
import written
from quality import Arm, Scores, Study

from tests.data.files import write_idx

SMALL = {"model.width": 16, "model.patch": 1, "model.depth": 2, "diffusion_blocks.num_blocks": 2, "train.batch_size": 8}
ARMS = [
    Arm("in blocks", SMALL, lrs=(1e-3, 4e-3)),
    Arm("whole", SMALL | {"train.objective": "exact"}, lrs=(1e-3,), seeds=1),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "toy")


class Counted:
    """Scores a session by its learning rate, so that it is known which is best, and counts how often it is asked."""

    def __init__(self) -> None:
        self.sessions: list[str] = []

    def __call__(self, folder: Path, session: Path) -> Scores:
        assert (session / "session.json").exists()
        self.sessions.append(session.name)
        return {"other": 9.0, "error": 1.0 if "-0.004-" in session.name else 2.0}


def study(folder: Path, data: Path) -> Study:
    how = argparse.Namespace(
        folder=folder, memory_budget="1GiB", jobs=1, threads=1, device="cpu",
    )  # fmt: skip
    return Study(how, "vit-fashion-mnist", data, 4, chosen_by=("error", "other"), maximise=False)


def test_a_study_trains_each_arm_once_and_goes_on_where_it_was(tmp_path: Path, data: Path) -> None:
    validate, test = Counted(), Counted()
    first = study(tmp_path / "study", data)
    first.run(ARMS, range(2), validate, test)

    assert first.rates == {"in blocks": 4e-3, "whole": 1e-3}  # the better of two; the only one
    assert len(validate.sessions) == len(set(validate.sessions)) == 8  # 1/4, 1/2, 1 of both, another rate, another seed
    tested = [(ARMS[0], 0), (ARMS[0], 1), (ARMS[1], 0)]  # once, at full length; the other has one seed
    names = [first.session(arm, seed, 1.0, first.rates[arm.name]).name for arm, seed in tested]
    assert sorted(test.sessions) == sorted(names)
    assert [one.steps for one in first.at(ARMS[0], "validation", 0.5)] == [2]
    name, lr, steps, curve, error, memory, seconds = next(first.rows(ARMS, ["error"]))
    assert (name, lr, steps, curve, error) == ("in blocks", "0.004", 4, "1.00 1.00 1.00", "1.00 ± 0.00")
    most = max(one.extra["peak_bytes"] for one in first.at(ARMS[0], "validation"))
    assert float(str(memory)) == pytest.approx((most - first.floor_bytes(ARMS[0])) / 2**20, abs=0.06)
    assert first.floor_bytes(ARMS[0]) > 50 << 20 and float(str(seconds)) >= 0
    assert first.cpu_s_a_step(ARMS[0]) > 0

    asked = Counted()
    again = study(tmp_path / "study", data)
    again.run(ARMS, range(2), asked, asked)
    assert asked.sessions == []
    assert list(again.rows(ARMS, ["error"])) == list(first.rows(ARMS, ["error"]))

    changed = Arm("in blocks", SMALL | {"model.width": 32}, lrs=(1e-3,))
    again.result(changed, 0, 0.25, 1e-3, "validation", asked)  # of the same name: trained all the same
    assert len(asked.sessions) == 1 and asked.sessions[0] not in validate.sessions


def test_spread_is_over_seeds_and_differences_have_a_standard_error() -> None:
    assert quality.spread([], 2) == ""
    assert quality.spread([1.0], 2) == "1.00"
    assert quality.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    # (1 / 3 + 4 / 3) ** .5
    assert quality.difference([1.0, 2.0, 3.0], [0.0, 2.0, 4.0], 3) == "+0.000 ± 1.291"
    assert quality.difference([1.0], [0.0, 2.0, 4.0], 1) == "-1.0"


def test_choices_never_see_the_test_images(tmp_path: Path, data: Path) -> None:
    from edgetrain.data import open_dataset

    packed = write_idx(tmp_path / "packed", compressed=True)
    choosing, testing = quality.split_train_set(packed, tmp_path / "split", 5)
    assert quality.split_train_set(packed, tmp_path / "split", 6)[0] != choosing  # another choice, other folders

    def images(folder: Path, split: str) -> np.ndarray:
        found = open_dataset(str(folder), split, tmp_path / "scratch")
        return found.read(np.arange(found.num_examples))[0]

    whole, test = images(packed, "train"), images(packed, "test")
    np.testing.assert_array_equal(images(choosing, "train"), whole[:-5])
    np.testing.assert_array_equal(images(choosing, "test"), whole[-5:])
    np.testing.assert_array_equal(images(testing, "train"), whole[:-5])
    np.testing.assert_array_equal(images(testing, "test"), test)


def test_texts_are_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "all.txt").write_text(text)
    fit, test = quality.split_text(tmp_path / "all.txt", tmp_path / "split")
    assert fit.read_text() + test.read_text() == text
    assert fit.read_text().endswith("\n") and 0.88 < len(fit.read_text()) / len(text) < 0.92


def test_the_frechet_distance_of_gaussians_is_known() -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(size=(20_000, 3))
    assert quality_dit.frechet(a, a) == pytest.approx(0.0, abs=1e-6)
    assert quality_dit.frechet(a, a + np.array([1.0, 2.0, 0.0])) == pytest.approx(5.0, rel=1e-6)
    # Deviation 3 against 1 in one direction: (3 - 1) ** 2.
    assert quality_dit.frechet(a, a * [3.0, 1.0, 1.0]) == pytest.approx(4.0, rel=0.05)


def test_a_grid_is_cut_into_its_images(tmp_path: Path) -> None:
    images = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((6, 4, 4), np.uint8) * 40
    canvas = np.full((2 * 4 + 2, 3 * 4 + 4), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // 3 * 6, i % 3 * 6
        canvas[top : top + 4, left : left + 4] = image
    Image.fromarray(canvas).save(tmp_path / "grid.png")
    np.testing.assert_array_equal(quality_dit.cut(tmp_path / "grid.png", 3, 4)[:, 0], images)


def test_distinct_counts_different_ngrams_of_all_texts() -> None:
    assert written.distinct(["a b a b a"], 2) == pytest.approx(2 / 4)  # a b, b a
    assert written.distinct(["a b", "a b"], 2) == pytest.approx(1 / 2)
    assert written.distinct(["a"], 2) == 0.0


def test_openings_are_spread_over_a_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(chr(97 + i % 26) for i in range(2600)))
    places = written.openings(tmp_path / "text.txt", 2)
    text = (tmp_path / "text.txt").read_text()
    assert [opening + after for opening, after in places] == [text[: 24 + 100], text[1300 : 1300 + 124]]


def test_the_answer_of_a_part_is_that_of_its_block() -> None:
    levels = [{"sigma": 4.0 / 2**i, "block": i // 2, "weighted": float(i)} for i in range(4)]
    assert quality_parts._answer(levels) == 2.5  # the lower half
    rows = [{"readout": "chain", "value": 1.0}, {"readout": "sigma_max", "value": 2.0}]
    assert quality_parts._answer(rows) == 2.0
    assert quality_parts._answer([{"readout": "top-1", "value": 3.0}]) == 3.0


def test_studies_know_what_an_arm_meant() -> None:
    assert quality.identity("dit-digits", {"model.width": 32}) == quality.identity("dit-digits", {"model.width": 32})
    assert quality.identity("dit-digits", {}) != quality.identity("dit-digits", {"model.width": 32})
    assert quality.identity("dit-digits", {}) != quality.identity("vit-digits", {})
