"""Two processes at one session, Ctrl-C and kills."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgetrain.session import Session
from tests.cli.workplace import START, command, commits, told_in_both, until, words


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
    told = START.replace("run()", "sys.stderr.write('here\\n'); run()")
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
    until(process, lambda: "edgetrain.cli.probe" in words(psutil.Process(process.pid)))
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
