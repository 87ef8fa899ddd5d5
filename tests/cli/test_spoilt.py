"""Sessions that are spoilt, newer, or changed in ways that they do not survive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.workplace import BUDGET


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
