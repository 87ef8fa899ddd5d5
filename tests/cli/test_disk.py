"""A loss that is lost, and disks that are full or read-only: what is committed stays."""

from __future__ import annotations

import re
import resource
import shutil
import signal

import pytest

from tests.cli.workplace import commits, told_in_both, until


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
