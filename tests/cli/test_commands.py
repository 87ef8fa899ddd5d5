"""What the commands print and refuse: text, JSON, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from edgetrain.cli.main import COMMANDS
from edgetrain.units import parse_bytes
from tests.cli.workplace import BUDGET, RECIPE, command

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


# Of a process of a small one, since a large one that starts it counts as its beginning.
MEASURED = """
import os, subprocess, sys
_, status, used = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print(used.ru_maxrss << 10, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(
    "arguments", [("train", "--steps", 64), ("evaluate",), ("generate", "--to", "grid.png", "--steps", 2)]
)
def test_the_peak_that_is_named_is_that_of_the_whole_process(place, session, arguments):
    """To its very end: taken down the usual way, what libraries bring back into memory is MiBs above it."""
    name, *more = arguments
    if name == "generate":
        session = place.folder / "generator"
        made = ["--recipe", place.recipe, "--set", "model.family=dit", "--steps", 2, "--memory-budget", BUDGET]
        place.json("train", session, *made)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command(name, session, *more, "--threads", 1, "--json")],
        capture_output=True, text=True, check=True, env=place.environment, cwd=place.folder,
    )  # fmt: skip
    assert int(done.stderr.split()[-1]) <= json.loads(done.stdout)["peak_bytes"] + (1 << 20)


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
from edgetrain.cli.main import main
assert not main.main(standalone_mode=False)
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


def test_a_file_where_a_folder_should_be(place, complete, tmp_path):
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "file" / "inside"):
        for arguments in (place.train(where), ["export", complete["session"], "--to", where]):
            assert re.search("not a directory|is a file|a file in its place", place.fails(2, *arguments)), arguments


def test_a_recipe_of_another_family_is_named_as_such(place, session):
    said = place.fails(2, "train", session, "--recipe", "dit-digits")
    assert "of the family 'dit', and this is a session of 'vit'" in said
    assert "Start a new session" in said


def test_a_budget_too_small_to_evaluate_in_is_refused_with_one_that_will_do(place, complete):
    said = place.json("evaluate", complete["session"], "--memory-budget", "100MiB", "--threads", 1, exit_code=3)
    enough = re.search(r"--memory-budget (\d+)MiB", said["hint"])[1]
    assert 150 < int(enough) < 260
    place.json("evaluate", complete["session"], "--memory-budget", f"{enough}MiB", "--threads", 1)


def test_blocks_that_are_as_they_began_are_named(place, tmp_path):
    arguments = place.train(tmp_path / "part", "--blocks", "1", "--visits", "1")
    assert place.run(*arguments).returncode == 0
    done = place.run("evaluate", tmp_path / "part", "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "not trained yet, so as they began: block 0\n")
    assert place.run("evaluate", place.folder / "complete", "--threads", 1).stderr == ""


def test_a_misspelt_key_in_a_recipe_file(place, tmp_path):
    (tmp_path / "typo.toml").write_text(RECIPE.replace("width", "widht"))
    text = place.fails(2, *place.train(tmp_path / "s", "--recipe", tmp_path / "typo.toml"))
    assert "'model.widht': did you mean 'model.width'" in text
    (tmp_path / "typo.toml").write_text("[train\n")
    assert "typo.toml cannot be read" in place.fails(
        2, *place.train(tmp_path / "s", "--recipe", tmp_path / "typo.toml")
    )
