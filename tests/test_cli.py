"""The commands as a user runs them: processes of their own, exit codes, text and JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgetrain.cli.main import COMMANDS
from edgetrain.session import Session
from edgetrain.units import parse_bytes

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


class Workplace:
    """A folder with a recipe, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE)
        self.environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, check=False, env=self.environment, cwd=self.folder,
            timeout=300,
        )  # fmt: skip

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment,
            cwd=self.folder, **options,
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


def test_evaluate_has_a_row_for_each_readout(place, complete):
    value = place.json("evaluate", complete["session"], "--draws", 2, "--threads", 1)
    rows = {row["readout"]: row for row in value["results"]}
    assert value["results"][0]["readout"] == "chain"
    assert {"chain", "chain-hard", "chain-mean2", "chain-hard-mean2", "sigma_max", "sigma_max-mean2"} == set(rows)
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
    assert plan["choice"] == {"micro_batch": 8, "activations": "keep", "moments_resident": True}
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


def test_errors_in_json(place, tmp_path):
    value = place.json("status", tmp_path / "none", exit_code=2)
    assert value["error"] == "UsageError"
    assert value["exit_code"] == 2
    assert "is no session" in value["message"]


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
    assert not (tmp_path / "s" / "session.json").exists()
    done = place.run(*arguments, named, *(["--steps", 4] if name == "train" else []), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["budget_bytes"] == parse_bytes(named)


def test_data_that_is_missing(place, tmp_path):
    assert "nowhere" in place.fails(7, *place.train(tmp_path / "s", "--data", tmp_path / "nowhere"))
    assert not (tmp_path / "s" / "session.json").exists()


def test_data_that_does_not_fit_the_session(place, session, tmp_path):
    import numpy as np
    from PIL import Image

    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / name / "0.png")
    text = place.fails(7, "train", session, "--data", tmp_path / "images", "--steps", 200)
    assert "2 classes" in text
    assert place.json("status", session)["steps"] == 60


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
        text = place.fails(6, "train", path, "--threads", 1)
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


def test_ctrl_c_commits_and_the_rest_is_the_same(place, complete, tmp_path):
    path = tmp_path / "s"
    process = place.start(*place.train(path, "--json"))
    until(process, lambda: commits(path) > 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    summary = json.loads(out)
    assert summary["status"] == "interrupted"
    assert 0 < sum(row["step"] for row in place.json("status", path)["blocks"]) < 120
    assert place.json("verify", path)["digest"] == summary["digest"]
    assert place.json("train", path, "--threads", 1)["digest"] == complete["digest"]


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
