"""The commands as a user runs them: processes of their own, exit codes, text and JSON."""

from __future__ import annotations

import copy
import fcntl
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edgetrain.cli.main import COMMANDS
from edgetrain.session import Session
from edgetrain.units import parse_bytes
from tests.data.files import (
    IMAGES,
    LABELS,
    cyclic_labels,
    idx_bytes,
    random_images,
    write_idx,
    write_image,
    write_image_folder,
)
from tests.data.test_open import FASHION_MNIST

ROOT = Path(__file__).parents[1]
BUDGET = "600MiB"
RECIPE = """
[data]
source = "digits"
shift = 1
[model]
width = 16
depth = 4
heads = 2
patch = 2
[diffusion_blocks]
num_blocks = 2
[train]
steps = 60
batch_size = 8
micro_batch = 8
visit_steps = 4
"""
_START = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", _START, *map(str, arguments)]


class Mounts:
    """A mount namespace, in which commands are run one after the other; skips where the system allows none."""

    def __init__(self, setup: str) -> None:
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *as_root, "sh", "-c", f"set -e; {setup}; echo ready; exec sleep 600"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.enter = ["nsenter", "--target", str(self._holder.pid), "--mount"]
        self.enter += ["--user", "--preserve-credentials"] if as_root else []
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            pytest.skip(f"no mounts here: {self._holder.communicate()[1]}")

    def sh(self, script: str) -> None:
        subprocess.run([*self.enter, "sh", "-c", script], check=False, capture_output=True)

    def path(self, path: Path) -> Path:
        """Where a path of the namespace is seen from outside."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def end(self) -> None:
        self._holder.kill()
        self._holder.communicate()


class Workplace:
    """A folder with a recipe, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.enter: list[str] = []
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE)
        self.environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}

    def inside(self, mounts: Mounts) -> Workplace:
        """The same place with other mounts."""
        there = copy.copy(self)
        there.enter = mounts.enter
        return there

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.enter, *command(*arguments)], capture_output=True, text=True, check=False, env=self.environment,
            cwd=self.folder, timeout=300,
        )  # fmt: skip

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.enter, *command(*arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment, cwd=self.folder, **options,
        )  # fmt: skip

    def json(self, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
        """The one object that a command with --json prints."""
        done = self.run(*arguments, "--json")
        assert done.returncode == exit_code, done.stderr + done.stdout
        assert len(done.stdout.splitlines()) == 1
        return json.loads(done.stdout)

    def fails(self, exit_code: int, *arguments: object) -> str:
        """What a command says on stderr, which has to end with that exit code and not with a traceback."""
        done = self.run(*arguments)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == exit_code, done.stderr + done.stdout
        assert done.stderr.startswith("edgetrain: ")
        assert done.stdout == ""
        return done.stderr

    def error(self, exit_code: int, *arguments: object) -> str:
        """The same with --json, where the error also is the one object on stdout."""
        done = self.run(*arguments, "--json")
        told_in_both(done.returncode, done.stdout, done.stderr)
        assert done.returncode == exit_code, done.stderr + done.stdout
        return done.stderr

    def train(self, session: Path, *arguments: object) -> list[object]:
        return ["train", session, "--recipe", self.recipe, "--memory-budget", BUDGET, "--threads", 1, *arguments]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def complete(place) -> dict[str, Any]:
    """The summary of an uninterrupted training."""
    summary: dict[str, Any] = place.json(*place.train(place.folder / "complete"))
    return summary


@pytest.fixture
def session(place, complete, tmp_path) -> Path:
    """A copy of the trained session, to be spoilt."""
    return Path(shutil.copytree(complete["session"], tmp_path / "session"))


@pytest.fixture
def mounted() -> Iterator[Callable[[str], Mounts]]:
    made: list[Mounts] = []

    def mount(setup: str) -> Mounts:
        made.append(Mounts(setup))
        return made[-1]

    yield mount
    for mounts in made:
        mounts.end()


def told_in_both(exit_code: int, out: str, err: str) -> None:
    """An error with --json: an object on stdout, the same words on stderr."""
    assert "Traceback" not in err, err
    (line,) = out.splitlines()
    value = json.loads(line)
    assert set(value) == {"error", "message", "hint", "exit_code"}
    assert value["exit_code"] == exit_code
    assert err == f"edgetrain: {value['message']}\n" + (f"{value['hint']}\n" if value["hint"] else "")


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits for the condition as long as the process runs."""
    while not condition():
        try:
            process.wait(timeout=0.005)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"ended too early: {process.communicate()}")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def commits(session: Path) -> int:
    """How many commits block 1, the first to be visited, has."""
    try:
        return int(json.loads((session / "groups" / "block01" / "manifest.json").read_text())["sequence"])
    except (OSError, ValueError):
        return 0


# ------------------------------------------------------------------------------------------------ what goes well


def test_the_summary_of_train(place, complete):
    assert {
        "session", "status", "step", "steps", "loss", "budget_bytes", "peak_bytes", "plan_peak_bytes", "bytes_read",
        "bytes_written", "seconds", "digest",
    } <= set(complete)  # fmt: skip
    assert complete["session"] == str(place.folder / "complete")
    assert (complete["status"], complete["step"], complete["steps"]) == ("complete", 60, 60)
    assert complete["budget_bytes"] == parse_bytes(BUDGET)
    assert 50 << 20 < complete["peak_bytes"] <= complete["budget_bytes"]
    assert 0 < complete["loss"] < 2.303, "less than guessing"
    assert complete["bytes_written"] > 30 * 4 * 16 * 64
    assert re.fullmatch("[0-9a-f]{64}", complete["digest"])
    assert (place.folder / "complete" / "plan.json").exists()
    for line in (place.folder / "complete" / "metrics.jsonl").read_text().splitlines():
        assert {"time", "block", "step", "loss", "lr"} <= set(json.loads(line))


def test_status_and_verify_name_the_same_digest(place, complete):
    status = place.json("status", complete["session"])
    assert (status["digest"], status["status"], status["step"]) == (complete["digest"], "complete", 60)
    assert [(row["block"], row["step"], row["group"]) for row in status["blocks"]] == [
        (0, 60, "block00"), (1, 60, "block01"),
    ]  # fmt: skip
    assert status["blocks"][0]["sigma"][0] == status["blocks"][1]["sigma"][1]
    assert status["blocks"][0]["sigma"][1] == 20.0
    verified = place.json("verify", complete["session"])
    assert (verified["digest"], verified["ok"]) == (complete["digest"], True)
    assert complete["digest"] in place.run("status", complete["session"]).stdout
    assert complete["digest"] in place.run("verify", complete["session"]).stdout


def test_a_complete_session_stays_as_it_is(place, complete, session):
    again = place.json("train", session, "--threads", 1)
    assert (again["status"], again["digest"]) == ("complete", complete["digest"])
    assert again["bytes_written"] == 0


def test_a_micro_batch_that_is_left_to_the_plan_is_the_one_there_is(place, complete, session, tmp_path):
    recipe = tmp_path / "again.toml"
    recipe.write_text("[train]\nmicro_batch = 0\n")
    for told in (["--set", "train.micro_batch=0"], ["--recipe", recipe]):
        again = place.json("train", session, *told, "--threads", 1)
        assert (again["status"], again["digest"]) == ("complete", complete["digest"])


def test_evaluate_has_a_row_for_each_readout(place, complete):
    value = place.json("evaluate", complete["session"], "--draws", 2, "--threads", 1)
    rows = {row["readout"]: row for row in value["results"]}
    assert value["results"][0]["readout"] == "chain"
    assert value["peak_bytes"] <= complete["peak_bytes"], "it holds no gradients"
    averaged = {"chain-mean2", "chain-hard-mean2", "sigma_max-mean2"}
    assert {"chain", "chain-mode", "chain-hard", "sigma_max", "sigma_max-mode"} | averaged == set(rows)
    for row in rows.values():
        assert set(row) == {"metric", "value", "readout", "split", "num_examples"}
        assert (row["metric"], row["split"]) == ("accuracy", "test")
        assert 0 <= row["value"] <= 100
        hits = row["value"] * row["num_examples"] / 100
        assert hits == pytest.approx(round(hits), abs=1e-6)
    again = place.json("evaluate", complete["session"], "--draws", 2, "--threads", 1)
    assert again["results"] == value["results"], "the noise is a function of the seed"


def test_plan_predicts_by_owner(place, complete):
    plan = place.json("plan", "--recipe", place.recipe, "--memory-budget", BUDGET, "--threads", 1)
    assert sum(plan["owners"].values()) == plan["peak_bytes"] == complete["plan_peak_bytes"]
    assert plan["choice"] == {
        "micro_batch": 8, "activations": "keep", "moments_resident": True, "keeps_freed": True
    }  # fmt: skip
    assert plan["smallest_budget_bytes"] <= parse_bytes(BUDGET)
    assert place.json("plan", complete["session"], "--threads", 1)["peak_bytes"] == plan["peak_bytes"]


def test_visits_and_blocks_train_a_part(place, tmp_path, complete):
    path = tmp_path / "s"
    first = place.json(*place.train(path, "--blocks", "0", "--visits", 2))
    assert (first["status"], first["step"]) == ("partial", 0)
    assert [row["step"] for row in place.json("status", path)["blocks"]] == [8, 0]
    rest = place.json("train", path, "--threads", 1, "--memory-budget", "700MiB", "--activations", "recompute")
    assert (rest["status"], rest["digest"]) == ("complete", complete["digest"])
    assert rest["budget_bytes"] == parse_bytes("700MiB")


def test_recipes_and_devices(place):
    recipes = place.json("recipes")["recipes"]
    assert {"vit-digits", "vit-fashion-mnist", "vit-cifar100-paper"} <= set(recipes)
    text = place.run("recipes", "vit-digits").stdout
    copied = place.folder / "copied.toml"
    copied.write_text(text)
    assert place.json("recipes", copied.name.removesuffix(".toml"), exit_code=2)["error"] == "UsageError"
    assert "did you mean 'vit-digits'" in place.fails(2, "recipes", "vit-digit")
    assert "cannot be read" in place.fails(2, "recipes", "none.toml")
    resolved = place.json("recipes", place.recipe)["recipe"]
    assert (resolved["model"]["width"], resolved["model"]["mlp_ratio"]) == (16, 4)
    assert "visit_steps = 4" in place.run("recipes", place.recipe).stdout
    assert "cpu" in {profile["kind"] for profile in place.json("devices")["devices"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_needs_no_torch(place, name):
    code = f"""
import sys
sys.argv = ["edgetrain", {name!r}, "--help"]
from edgetrain.cli.main import run
try:
    run()
except SystemExit as done:
    assert not done.code
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=place.environment
    )
    assert done.returncode == 0, done.stderr
    *text, torch_imported = done.stdout.splitlines()
    assert "Example" in done.stdout
    assert any(line.strip().startswith(f"edgetrain {name}") for line in text)
    assert "--json" in done.stdout
    assert torch_imported == "False"


# ----------------------------------------------------------------------------------------------- what goes wrong


def test_what_is_no_session(place, tmp_path):
    for name in ("status", "verify", "evaluate", "plan"):
        assert "is no session" in place.fails(2, name, tmp_path / "none")
    assert "--recipe" in place.fails(2, "train", tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "is no session" in place.fails(2, "status", tmp_path / "other")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "error"),
    [
        (["--bogus"], 2, "UsageError"),
        (["--set", "train.batchsize=3"], 2, "UsageError"),
        (["--memory-budget", "10MiB"], 3, "BudgetInfeasible"),
        (["--data", "nowhere"], 7, "BadInput"),
    ],
)
@pytest.mark.usefixtures("complete")  # so that the probe is cached
def test_errors_in_json(place, tmp_path, arguments, exit_code, error):
    value = place.json(*place.train(tmp_path / "s", *arguments), exit_code=exit_code)
    assert (value["error"], value["exit_code"]) == (error, exit_code)
    assert value["message"]
    assert value["hint"], "what to try"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "train.batchsize=3"], "train.batch_size"),
        (["--steps", "0"], "0"),
        (["--set", "train.steps=0"], "train.steps must be at least 1"),
        (["--memory-budget", "lots"], "'lots' is not a size"),
        (["--blocks", "0,7"], "blocks 0 to 1"),
        (["--blocks", "x"], "is no list of numbers"),
        (["--visits", "0"], "0"),
        (["--recipe", "vit-digit"], "vit-digits"),
        (["--set", "train"], "sets nothing"),
        (["--bogus"], "--bogus"),
    ],
)  # fmt: skip
def test_usage_errors_of_train(place, tmp_path, arguments, says):
    assert says in place.fails(2, *place.train(tmp_path / "s", *arguments))
    assert not (tmp_path / "s").exists()


def test_a_device_that_does_not_exist_is_a_usage_error(place, tmp_path):
    assert "bogus" in place.fails(2, *place.train(tmp_path / "s", "--device", "bogus"))


@pytest.mark.parametrize("name", ["plan", "train"])
def test_an_infeasible_budget_names_one_that_would_do(place, complete, tmp_path, name):
    target = [tmp_path / "s"] if name == "train" else []
    arguments = [name, *target, "--recipe", place.recipe, "--threads", 1, "--memory-budget"]
    text = place.fails(3, *arguments, "10MiB")
    (named,) = re.findall(r"Use --memory-budget (\d+MiB)", text)
    assert not (tmp_path / "s").exists()
    done = place.run(*arguments, named, *(["--steps", 4] if name == "train" else []), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["budget_bytes"] == parse_bytes(named)


def test_a_misspelt_key_in_a_recipe_file(place, tmp_path):
    (tmp_path / "typo.toml").write_text(RECIPE.replace("width", "widht"))
    text = place.fails(2, *place.train(tmp_path / "s", "--recipe", tmp_path / "typo.toml"))
    assert "'model.widht': did you mean 'model.width'" in text
    (tmp_path / "typo.toml").write_text("[train\n")
    assert "typo.toml cannot be read" in place.fails(
        2, *place.train(tmp_path / "s", "--recipe", tmp_path / "typo.toml")
    )


# ------------------------------------------------------------------------------------------------------- the data


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def a_truncated_idx_file(folder: Path) -> list[str]:
    shortened(write_idx(folder) / IMAGES["train"])
    return [IMAGES["train"], "truncated", "50x5x4", "1016 bytes", "1009"]


def a_truncated_header(folder: Path) -> list[str]:
    (write_idx(folder) / IMAGES["train"]).write_bytes(b"\0\0\x08\x03\0\0")
    return [IMAGES["train"], "truncated", "6 of 16 bytes"]


def a_truncated_gz_file(folder: Path) -> list[str]:
    shortened(write_idx(folder, compressed=True) / f"{IMAGES['train']}.gz")
    return [f"{IMAGES['train']}.gz", "truncated or damaged", "gzip -t"]


def fewer_labels_than_images(folder: Path) -> list[str]:
    (write_idx(folder) / LABELS["train"]).write_bytes(idx_bytes(cyclic_labels(49, 3)))
    return ["50 images", "49 labels", LABELS["train"]]


def no_labels(folder: Path) -> list[str]:
    (write_idx(folder) / LABELS["train"]).unlink()
    return ["neither", LABELS["train"], "four files"]


def something_unreadable(folder: Path) -> list[str]:
    (write_idx(folder) / IMAGES["train"]).unlink()
    (folder / IMAGES["train"]).mkdir()
    return ["Cannot read", IMAGES["train"], "directory"]


def images_of_mixed_size(folder: Path) -> list[str]:
    write_image(write_image_folder(folder, ("a", "b"), 6) / "b" / "odd.png", np.zeros((8, 7), np.uint8))
    return ["mixed size", "6x8", "odd.png is 7x8"]


def a_damaged_image(folder: Path) -> list[str]:
    (write_image_folder(folder, ("a", "b"), 6) / "a" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return ["03.png", "replace or remove"]


def a_single_class(folder: Path) -> list[str]:
    write_image_folder(folder, ("a",), 6)
    return ["1 class folders", "two"]


def nothing_known(folder: Path) -> list[str]:
    folder.mkdir()
    return ["known format", "IDX"]


def nothing_there(folder: Path) -> list[str]:
    return ["no data at", folder.name]


@pytest.mark.parametrize(
    "damage",
    [
        a_truncated_idx_file, a_truncated_header, a_truncated_gz_file, fewer_labels_than_images, no_labels,
        something_unreadable, images_of_mixed_size, a_damaged_image, a_single_class, nothing_known, nothing_there,
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_leaves_nothing(place, tmp_path, damage):
    said = damage(tmp_path / "data")
    text = place.error(7, *place.train(tmp_path / "s", "--data", tmp_path / "data", "--set", "model.patch=1"))
    assert not [word for word in said if word.lower() not in text.lower()], text
    assert not (tmp_path / "s").exists()


def test_test_images_of_another_size(place, complete, tmp_path):
    (write_idx(tmp_path / "data") / IMAGES["test"]).write_bytes(idx_bytes(random_images(20, 4, 4)))
    text = place.fails(7, "evaluate", complete["session"], "--data", tmp_path / "data")
    assert "mixed size" in text
    assert "has 4x5" in text
    assert "has 4x4" in text


def plain_digits(folder: Path) -> Path:
    """The embedded digits as plain files."""
    folder.mkdir()
    for file in (ROOT / "edgetrain" / "data" / "digits").glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return folder


@pytest.mark.slow
def test_data_that_is_lost_amid_the_training(place, complete, tmp_path):
    data, path = plain_digits(tmp_path / "data"), tmp_path / "s"
    process = place.start(*place.train(path, "--data", data, "--json"))
    until(process, lambda: commits(path) > 1)
    images = (data / IMAGES["train"]).read_bytes()
    os.truncate(data / IMAGES["train"], 1000)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    told_in_both(7, out, err)
    assert f"{IMAGES['train']} is truncated" in err
    assert place.json("verify", path)["ok"]
    assert "truncated" in place.fails(7, "train", path, "--threads", 1)
    (data / IMAGES["train"]).write_bytes(images)
    assert place.json("train", path, "--threads", 1)["digest"] == complete["digest"]


def test_data_that_does_not_fit_the_session(place, session, tmp_path):
    for split in ("train", "test"):
        write_image_folder(tmp_path / "images" / split, ("a", "b"), 1)
    text = place.fails(7, "train", session, "--data", tmp_path / "images", "--steps", 200)
    assert "2 classes" in text
    assert place.json("status", session)["steps"] == 60


def test_data_is_found_from_any_folder(place, tmp_path):
    write_image_folder(place.folder / "images" / "train", ("cat", "dog"), 6)
    write_image_folder(place.folder / "images" / "test", ("cat", "dog"), 2)
    place.json(*place.train(tmp_path / "s", "--data", "images", "--visits", 1, "--set", "model.patch=1"))
    elsewhere = copy.copy(place)
    elsewhere.folder = tmp_path
    assert elsewhere.json("evaluate", "s", "--threads", 1)["results"]
    shutil.rmtree(place.folder / "images")
    elsewhere.json("export", "s", "--to", "model")
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["class_names"] == ["cat", "dog"]


def test_images_are_classified_chunk_by_chunk(place, complete, tmp_path):
    place.json("export", complete["session"], "--to", tmp_path / "model")
    image = tmp_path / "one.png"
    write_image(image, random_images(1, 8, 8)[0])
    few = place.json("predict", tmp_path / "model", *[image] * 256, "--threads", 1)
    many = place.json("predict", tmp_path / "model", *[image] * 3000, "--threads", 1)
    assert len(many["predictions"]) == 3000
    assert many["predictions"][0]["class"] == few["predictions"][0]["class"]
    assert many["peak_bytes"] - few["peak_bytes"] < 12 << 20


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no {FASHION_MNIST}: set EDGETRAIN_FASHION_MNIST")
def test_fashion_mnist_from_its_files_to_onnx(place, tmp_path):
    path, model = tmp_path / "s", tmp_path / "model"
    told = ["--recipe", "vit-fashion-mnist", "--data", FASHION_MNIST, "--memory-budget", "400MiB"]
    done = place.json("train", path, *told, "--steps", 150, "--set", "train.visit_steps=50")
    assert done["peak_bytes"] <= 400 << 20
    here = {row["readout"]: row["value"] for row in place.json("evaluate", path, "--draws", 1)["results"]}
    assert here["chain"] > 50
    place.json("export", path, "--to", model)
    there = {
        row["readout"]: row for row in place.json("predict", model, "--data", FASHION_MNIST, "--draws", 1)["results"]
    }
    assert there["chain"]["num_examples"] == 10_000
    assert there["chain"]["value"] == pytest.approx(here["chain"], abs=0.1)


# ------------------------------------------------------------------------------------------- the loss, and the disk


def test_a_diverging_loss(place, tmp_path):
    path = tmp_path / "s"
    text = place.error(9, *place.train(path, "--set", "optimizer.lr=1e6", "--set", "train.visit_steps=50"))
    assert re.search(r"block 1 diverged: the loss of the 10 steps up to step \d+", text)
    assert "learning rate, now 1e+06" in text
    assert [row["step"] for row in place.json("status", path)["blocks"]] == [0, 0], "as at the last commit"
    assert place.json("verify", path)["ok"]


@pytest.mark.parametrize("visit_steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_after_a_diverging_loss_a_lower_rate_will_do(place, complete, tmp_path, visit_steps):
    """Nothing that was broken is committed, even by visits shorter than the divergence."""
    path = tmp_path / "s"
    place.fails(9, *place.train(path, "--set", "optimizer.lr=1e6", "--set", f"train.visit_steps={visit_steps}"))
    again = place.json("train", path, "--threads", 1, "--set", "optimizer.lr=0.001")
    assert (again["status"], again["digest"]) == ("complete", complete["digest"])


def test_a_disk_too_small_for_the_session(place, complete, tmp_path, mounted):
    mounts = mounted(f"mount -t tmpfs -o size=300k none '{tmp_path}'")
    there, path = place.inside(mounts), tmp_path / "s"
    text = there.error(5, *place.train(path))
    assert re.search(r"disk full: \S+ needs \d+\.\d KiB, and \d+\.\d KiB are free\nFree some space", text)
    assert "is no session" in there.fails(2, "status", path)
    mounts.sh(f"mount -o remount,size=4m '{tmp_path}'")
    assert there.json(*place.train(path))["digest"] == complete["digest"]


def test_a_disk_that_gets_full_amid_the_training(place, complete, tmp_path, mounted):
    mounts = mounted(f"mount -t tmpfs -o size=4m none '{tmp_path}'")
    there, path = place.inside(mounts), tmp_path / "s"
    process = there.start(*place.train(path, "--json"))
    until(process, lambda: commits(mounts.path(path)) > 1)
    process.send_signal(signal.SIGSTOP)
    mounts.sh(f"cat /dev/zero > '{tmp_path}/ballast'")
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    told_in_both(5, out, err)
    assert re.search(r"disk full: \S+ needs \S+ \w*B, and 0 B are free", err)
    assert there.json("verify", path)["ok"]
    assert 0 < sum(row["step"] for row in there.json("status", path)["blocks"]) < 120
    assert "disk full" in there.fails(5, "train", path, "--threads", 1)
    mounts.sh(f"rm '{tmp_path}/ballast'")
    resumed = there.json("train", path, "--threads", 1)
    assert (resumed["status"], resumed["digest"]) == ("complete", complete["digest"])


def test_a_limit_on_the_size_of_files_is_a_full_disk(place, tmp_path):
    path = tmp_path / "s"
    process = place.start(*place.train(path, "--json"))
    until(process, lambda: commits(path) > 1)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 10, resource.RLIM_INFINITY))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    told_in_both(5, out, err)
    assert "disk full (limit on a file's size)" in err
    assert place.json("verify", path)["ok"]


def test_a_folder_that_can_only_be_read(place, complete, session, mounted):
    there = place.inside(mounted(f"mount --bind -o ro '{session}' '{session}'"))
    assert "read-only" in there.error(5, "train", session, "--threads", 1, "--steps", 70)
    assert "read-only" in there.error(5, *place.train(session / "new"))
    assert there.json("status", session)["digest"] == complete["digest"]
    assert there.json("verify", session)["digest"] == complete["digest"]
    assert place.json("status", session)["steps"] == 60


def test_an_export_to_a_disk_that_is_full_or_read_only(place, complete, tmp_path, mounted):
    mounts = mounted(f"mount -t tmpfs -o size=64k none '{tmp_path}'")
    there, export = place.inside(mounts), ["export", complete["session"], "--to", tmp_path / "model"]
    assert "disk full" in there.error(5, *export)
    mounts.sh(f"cat /dev/zero > '{tmp_path}/ballast'")
    assert "disk full" in there.error(5, *export)
    assert [path.name for path in mounts.path(tmp_path).iterdir()] == ["ballast"]
    mounts.sh(f"mount -o remount,ro '{tmp_path}'")
    assert "read-only" in there.error(5, *export)


@pytest.mark.slow
def test_a_model_in_a_folder_that_can_only_be_read(place, session, tmp_path, mounted):
    shutil.rmtree(session / "scratch")
    there = place.inside(mounted(f"mount --bind -o ro '{session}' '{session}'"))
    assert there.json("evaluate", session, "--threads", 1)["results"]
    assert there.json("export", session, "--to", tmp_path / "model")["parity"]
    again = place.json("train", session, "--threads", 1, "--steps", 61)
    assert (again["status"], again["step"]) == ("complete", 61)


# ------------------------------------------------------------------------------------------------ spoilt sessions


def test_a_session_of_a_newer_format(place, session):
    header = json.loads((session / "session.json").read_text())
    (session / "session.json").write_text(json.dumps(header | {"version": header["version"] + 1}))
    for name in ("status", "verify", "train", "evaluate"):
        assert "newer" in place.fails(4, name, session)


@pytest.mark.parametrize("content", [b"", b'{"version": 1}', b"\xff\xfe"])
@pytest.mark.parametrize("file", ["session.json", "groups/block00/manifest.json"])
def test_a_damaged_header_or_manifest(place, session, file, content):
    (session / file).write_bytes(content)
    for name in ("status", "train"):
        assert Path(file).name in place.fails(4, name, session)


def test_a_manifest_with_a_changed_number(place, session):
    path = session / "groups" / "block01" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"step":60', '"step":61'))
    assert path.read_text() != text
    assert "checksum" in place.fails(4, "status", session)


@pytest.mark.parametrize("content", ["{}", '{"budget_bytes": "many"}', '{"budget_bytes": -1}', "[1", "[]"])
def test_a_damaged_plan(place, session, content):
    (session / "plan.json").write_text(content)
    assert "plan.json" in place.fails(4, "evaluate", session)
    assert place.run("plan", session, "--threads", 1, "--memory-budget", BUDGET).returncode == 0


@pytest.mark.parametrize("damage", ["spec.toml", "missing manifest", "missing slot", "short slot"])
def test_other_damage(place, session, damage):
    slot = session / "stages" / "block00.stem.a.safetensors"
    if damage == "spec.toml":
        (session / "spec.toml").write_text("[model]\nwidth = 'x'\n")
    elif damage == "missing manifest":
        (session / "groups" / "block01" / "manifest.json").unlink()
    elif damage == "missing slot":
        slot.unlink()
    else:
        slot.write_bytes(slot.read_bytes()[:-4096])
    place.fails(4, "status", session)


@pytest.mark.parametrize("file", ["codebook.frozen", "block00.stem", "block01.layer003"])
def test_verify_finds_a_flipped_bit(place, complete, session, file):
    stages = session / "stages"
    if file.endswith("frozen"):
        path = stages / f"{file}.safetensors"
    else:
        group = json.loads((session / "groups" / file.partition(".")[0] / "manifest.json").read_text())
        path = stages / f"{file}.{group['stages'][file]['slot']}.safetensors"
    data = bytearray(path.read_bytes())
    data[int.from_bytes(data[:8], "little") + 8 + 16] ^= 1  # in the first tensor
    path.write_bytes(data)
    text = place.fails(4, "verify", session)
    assert file.removesuffix(".frozen") in text
    assert place.json("status", session)["digest"] == complete["digest"], "status reads manifests alone"


def test_less_memory_than_before_goes_on_with_smaller_micro_batches(place, tmp_path):
    path = tmp_path / "s"
    one = ["--threads", 1, "--activations", "keep"]
    whole = [f"train.{name}=384" for name in ("batch_size", "micro_batch")] + ["model.patch=1"]
    settings = [word for setting in whole for word in ("--set", setting)]
    first = place.json(*place.train(path, "--visits", 1), *settings, "--activations", "keep")
    # Less than the same needs without the holes of a heap.
    holes = json.loads((path / "plan.json").read_text())["owners"].get("holes", 0)
    less = ["--memory-budget", first["plan_peak_bytes"] - holes - (16 << 20), *one]
    assert place.json("plan", path, *less)["choice"]["micro_batch"] < 384
    done = place.json("train", path, *less, "--visits", 2)
    assert done["peak_bytes"] <= done["budget_bytes"] < first["peak_bytes"]
    assert (done["retries"], done["activations"]) == (0, "keep")
    logs = [row["micro_batches"] for row in place.json("status", path)["blocks"]]
    assert logs == [[[0, 384], [0, done["micro_batch"]]], [[0, 384], [4, done["micro_batch"]]]]
    assert place.json("verify", path)["digest"] == done["digest"]
    refused = place.run("train", path, "--memory-budget", "100MiB", "--json")
    assert refused.returncode == 3
    assert "--set" not in json.loads(refused.stdout)["hint"], "a session's spec cannot change"


@pytest.mark.parametrize("given", [["--data", "digits"], ["--set", "train.batch_size=4"]])
def test_plan_of_a_session_takes_no_other_settings(place, complete, given):
    assert place.run("plan", complete["session"], *given).returncode == 2


@pytest.mark.parametrize("damage", ["a slot", "manifests of another copy"])
def test_weights_that_are_not_the_manifests_are_not_used(place, session, damage, tmp_path):
    if damage == "a slot":
        manifest = json.loads((session / "groups" / "block00" / "manifest.json").read_text())
        path = session / "stages" / f"block00.stem.{manifest['stages']['block00.stem']['slot']}.safetensors"
        data = bytearray(path.read_bytes())
        start = int.from_bytes(data[:8], "little") + 8
        data[start : start + 400] = bytes(400)
        path.write_bytes(data)
    else:
        other = Path(shutil.copytree(session, tmp_path / "other"))
        assert place.json("train", other, "--steps", 62, "--threads", 1)["status"] == "complete"
        shutil.copytree(other / "groups", session / "groups", dirs_exist_ok=True)
        path = session / "stages" / "block0"
    for arguments in (
        ["train", session, "--steps", 64],
        ["evaluate", session],
        ["export", session, "--to", tmp_path / "e"],
    ):
        text = place.fails(4, *arguments)
        assert str(path) in text
        assert "the manifest says" in text
        assert "edgetrain verify" in text
    assert not (tmp_path / "e").exists()


def test_steps_below_what_is_done_are_refused(place, complete, session):
    assert "60 steps are trained already" in place.fails(2, "train", session, "--threads", 1, "--steps", 50)
    assert "train.seed" in place.fails(2, "train", session, "--threads", 1, "--set", "train.seed=3")
    assert place.json("status", session)["steps"] == 60


def test_a_folder_of_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty" in place.fails(2, *place.train(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------- two processes, and interrupts


def test_a_second_process_is_locked_out(place, complete, tmp_path):
    path = tmp_path / "s"
    first = place.start(*place.train(path, "--steps", 100000))
    try:
        until(first, lambda: commits(path) > 1)
        text = place.error(6, "train", path, "--threads", 1)
        assert str(first.pid) in text
        assert place.run("status", path).returncode == 0, "reading needs no lock"
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert first.returncode == 130
    assert place.run("verify", path).returncode == 0


def test_a_locked_out_process_changes_nothing(place, session):
    before = (session / "spec.toml").read_bytes()
    store = Session.open(session).store
    with store.lock(["block00", "block01"]):
        place.fails(6, "train", session, "--threads", 1, "--steps", 200, "--set", "optimizer.lr=0.5")
    assert (session / "spec.toml").read_bytes() == before, "the spec of the process that trains"


def test_a_second_process_that_creates_the_session_is_locked_out(place, complete, tmp_path):
    path = tmp_path / "s"
    path.mkdir()
    with (path / "session.creating").open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        assert "another process is creating" in place.error(6, *place.train(path))
    assert place.json(*place.train(path, "--visits", 1))["status"] == "partial"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_commits_and_the_rest_is_the_same(place, complete, tmp_path, number):
    path = tmp_path / "s"
    process = place.start(*place.train(path, "--json"))
    until(process, lambda: commits(path) > 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    summary = json.loads(out)
    assert summary["status"] == "interrupted"
    assert 0 < sum(row["step"] for row in place.json("status", path)["blocks"]) < 120
    assert place.json("verify", path)["digest"] == summary["digest"]
    assert place.json("train", path, "--threads", 1)["digest"] == complete["digest"]


def test_a_second_ctrl_c_stops_at_once(place, complete, tmp_path):
    path = tmp_path / "s"
    process = place.start(*place.train(path))
    until(process, lambda: commits(path) > 2)
    process.send_signal(signal.SIGINT)
    until(process, lambda: not _catches(process.pid, signal.SIGINT))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, "the system ended it"
    assert "Traceback" not in err
    assert place.json("verify", path)["ok"]
    resumed = place.json("train", path, "--threads", 1)
    assert (resumed["status"], resumed["digest"]) == ("complete", complete["digest"])


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> number - 1 & 1)


def test_ctrl_c_before_the_first_step(place, complete, tmp_path):
    path = tmp_path / "s"
    process = place.start(*place.train(path, "--json"))
    until(process, path.exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    summary = json.loads(out)
    assert (summary["status"], summary["step"], summary["loss"]) == ("interrupted", 0, None)
    assert [row["step"] for row in place.json("status", path)["blocks"]] == [0, 0]
    assert place.json(*place.train(path))["digest"] == complete["digest"]


_IN_A_FINALIZER = """
class Thing: pass
thing = Thing()
weakref.finalize(thing, signal.raise_signal, signal.SIGINT)
del thing
time.sleep(30)
"""
_DROPPED = """
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
raise AttributeError("what an import leaves half done")
"""


@pytest.mark.parametrize("code", [_IN_A_FINALIZER, _DROPPED])
def test_a_ctrl_c_that_something_swallows_is_not_lost(place, code):
    start = f"""
import signal, time, weakref
from edgetrain.cli.main import guarded
guarded(lambda: exec({code!r}), as_json=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, check=False, env=place.environment
    )
    assert done.returncode == 130, done.stderr
    told_in_both(130, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("tenths", range(0, 40, 2))
def test_ctrl_c_at_any_time(place, tmp_path, tenths):
    """From the first moment on, the measuring of the first start included; none may be lost."""
    path = tmp_path / "s"
    environment = place.environment | {"XDG_CACHE_HOME": str(tmp_path / "empty")}
    told = _START.replace("run()", "sys.stderr.write('here\\n'); run()")
    arguments = map(str, place.train(path, "--steps", 1000000, "--json"))
    process = subprocess.Popen(
        [sys.executable, "-c", told, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(tenths / 10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (130, -signal.SIGINT), err  # a shell calls either 130
    assert "Traceback" not in err
    value = json.loads(out)
    assert value.get("status") == "interrupted" or value["error"] == "Interrupted"
    assert not path.exists() or place.json("verify", path)["ok"]
    assert place.json(*place.train(path, "--steps", 1000000, "--visits", 1))["status"] == "partial"


def test_ctrl_c_while_the_probe_runs(place, tmp_path):
    """The probe has taken the command's place in its process."""
    path = tmp_path / "s"
    environment = place.environment | {"XDG_CACHE_HOME": str(tmp_path / "empty")}
    process = subprocess.Popen(
        command(*place.train(path, "--json")), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    until(process, lambda: "edgetrain.cli.probe" in _words(psutil.Process(process.pid)))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads(out)["error"] == "Interrupted"
    assert place.json(*place.train(path, "--visits", 1))["status"] == "partial"


@pytest.mark.parametrize(
    "moment", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(5, marks=pytest.mark.slow),
               pytest.param(12, marks=pytest.mark.slow)],
)  # fmt: skip
def test_killed_and_resumed(place, complete, tmp_path, moment):
    """Killed as soon as the folder is there, or after a number of commits."""
    path = tmp_path / "s"
    process = place.start(*place.train(path))
    until(process, lambda: path.exists() if moment == 0 else commits(path) >= moment)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = place.json(*place.train(path))
    assert (resumed["status"], resumed["digest"]) == ("complete", complete["digest"])
    assert place.json("verify", path)["digest"] == complete["digest"]


@pytest.mark.slow
def test_killed_again_and_again(place, complete, tmp_path):
    path = tmp_path / "s"
    for target in range(1, 14, 4):
        process = place.start(*place.train(path))
        until(process, lambda target=target: commits(path) >= target)
        process.kill()
        process.communicate()
        assert place.run("verify", path).returncode == 0
    assert place.json(*place.train(path))["digest"] == complete["digest"]
