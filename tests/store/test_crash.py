"""Whenever the process ends or the disk refuses, the last committed state is there, entire."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest

from edgetrain.errors import DiskError, SessionCorrupt
from edgetrain.store import Store
from tests.store import child
from tests.store.common import (
    CODEBOOK,
    GROUPS,
    ROOT,
    holds,
    new_store,
    python,
    reopened,
    run_child,
    section,
    sound,
    update,
)

# Called in an update of the group's two stages: the lock's file and its pid, a sync of the folder, then for each stage
# one open, three writes and one sync, then the manifest.
NUM_CALLS = 21


def digests(tmp_path: Path, numbers: range) -> dict[str, int]:
    """For each number the digest of a session that holds it in group 00 only."""
    store = new_store(tmp_path / "reference")
    found = {store.digest(): 0}
    with store.lock(["00"]):
        for number in numbers[1:]:
            update(store, "00", number)
            found[store.digest()] = number
    return found


def test_a_crash_at_each_call_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    expected = digests(tmp_path, range(2))
    path = tmp_path / "session"
    new_store(path)
    seen: list[int] = []
    for call in range(100):
        ended = run_child("crash_in_update", str(path), str(call))
        if ended.returncode == 0:
            break
        assert ended.returncode == child.CRASHED, ended.stderr
        store = reopened(path)
        seen.append(expected[store.digest()])
        assert sound(store)
        assert holds(store, "00", seen[-1])
        assert holds(store, "01", 0)
        if seen[-1] == 1:
            with store.lock(["00"]):
                update(store, "00", 0)
    assert ended.returncode == 0
    assert len(seen) >= NUM_CALLS
    # Only the sync of the folder comes after the rename.
    assert seen == sorted(seen)
    assert 0 < seen.count(1) <= 3


def test_a_crash_in_creation_lets_it_be_finished(tmp_path: Path) -> None:
    for call in range(0, 200, 7):
        path = tmp_path / f"session{call}"
        ended = run_child("crash_in_creation", str(path), str(call))
        if ended.returncode == 0:
            break
        assert ended.returncode == child.CRASHED, ended.stderr
        try:
            store = reopened(path)
        except SessionCorrupt:
            store = Store.create(path, GROUPS, [CODEBOOK])
        with store.lock(GROUPS):
            if len(store.uncommitted) == len(GROUPS):
                store.write_frozen("codebook", [memoryview(section(CODEBOOK, "frozen", 0))])
            for group in store.uncommitted:
                update(store, group, 0)
        assert sound(reopened(path))
        assert holds(store, "00", 0)
        assert holds(store, "01", 0)
    assert ended.returncode == 0


def test_kill_at_random_moments(tmp_path: Path) -> None:
    path = tmp_path / "session"
    new_store(path)
    moments = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(python("commit_for_ever", str(path)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        try:
            process.wait(moments.uniform(0, 0.05))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        printed = [first, *map(int, process.stdout.read().split())]
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        store = reopened(path)
        assert sound(store)
        for group in GROUPS:
            number = store.manifest(group).state["number"]
            assert number in (printed[-1], printed[-1] + 1)
            assert holds(store, group, number)


def test_a_refused_write_loses_nothing(tmp_path: Path) -> None:
    new_store(tmp_path)
    ended = run_child("file_limit", str(tmp_path))
    assert ended.returncode == DiskError.exit_code, ended.stderr
    assert "disk full (limit on a file's size)" in ended.stdout
    assert "block00." in ended.stdout
    assert sound(reopened(tmp_path))


def in_own_mounts(setup: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``child.py`` after the shell commands ``setup`` in a mount namespace of its own; skips where that is not
    allowed."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if os.geteuid() != 0 or probe.returncode != 0:
        pytest.skip("mounting needs root")
    command = f'set -e; {setup}; exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *python(*arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    ended = in_own_mounts(f"mount -t tmpfs -o size=420k none '{tmp_path}'", "full_disk", str(tmp_path))
    assert ended.returncode == DiskError.exit_code, ended.stderr
    creation, update_ = (line for line in ended.stdout.splitlines() if line.startswith("disk full"))
    assert "session needs" in creation
    assert re.search(r"manifest\.json\.\d+\.new needs", update_)


def test_a_read_only_folder_can_be_read(tmp_path: Path) -> None:
    new_store(tmp_path)
    ended = in_own_mounts(f"mount --bind -o ro '{tmp_path}' '{tmp_path}'", "read_only", str(tmp_path))
    assert ended.returncode == DiskError.exit_code, ended.stderr
    assert "read-only" in ended.stdout
    assert "lock" in ended.stdout
