"""Commands run as a user runs them: a folder with a recipe, a namespace with mounts, what is waited for."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
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
START = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", START, *map(str, arguments)]


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


def words(process: psutil.Process) -> list[str]:
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
