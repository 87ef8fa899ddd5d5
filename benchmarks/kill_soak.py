"""Nothing is lost to kill -9: a short training killed at many moments, resumed each time, against an uninterrupted one.

Sessions are trained by two blocks in visits of two steps, with a commit each, and are killed ten times before they
complete. A third of the kills comes by the clock, a third as soon as a new manifest appears beside the old one, a third
up to 10 ms after a slot was first written to. What a kill interrupted is read from the files that it left, not from
the intention: a manifest not yet renamed, or slots newer than the manifest, were inside a write or commit.

To show: every digest equals the uninterrupted one's; of 100 kills at least 60 come after the first commit and at least
20 inside a write or commit. After each kill ``edgetrain verify`` must find the session whole.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import edgetrain, environment, executable, parser, progress, report, settings, temporary_folder

from edgetrain.store.disk import aside_path

_KILLS_PER_SESSION = 10
_STEPS = 200
_SPEC = {
    "model.width": 32, "model.depth": 4, "diffusion_blocks.num_blocks": 2, "train.steps": _STEPS,
    "train.visit_steps": 2, "train.batch_size": 32,
}  # fmt: skip
_ARGUMENTS = ["--recipe", "vit-digits", "--memory-budget", "350MiB", "--threads", "1", *settings(_SPEC)]
_CREATING, _STARTING, _BETWEEN, _INSIDE = (
    "while the session is created", "before the first commit", "between commits", "inside a write or commit",
)  # fmt: skip


class Files:
    """The times of a session's slots and manifests, watched from outside."""

    def __init__(self, session: Path) -> None:
        self.session = session
        self.start = self.times()

    def times(self) -> dict[Path, int]:
        """{path: time of the last change in ns} of slots, manifests, and manifests not yet renamed."""
        found = {}
        for path in itertools.chain(self.session.glob("stages/*"), self.session.glob("groups/*/manifest.json*")):
            try:
                found[path] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
        return found

    def steps(self) -> int:
        """Committed optimizer steps of all blocks."""
        manifests = [json.loads(path.read_text()) for path in self.session.glob("groups/*/manifest.json")]
        return sum(block["step"] for one in manifests for block in one["state"]["blocks"].values())

    def interrupted(self) -> str:
        """What was going on when the process, which began after ``start``, died."""
        if not (self.session / "session.json").exists():
            return _CREATING
        changed = {path: at for path, at in self.times().items() if at != self.start.get(path)}
        manifests = {path.parent.name: path.stat().st_mtime_ns for path in self.session.glob("groups/*/manifest.json")}
        for path, at in changed.items():
            group = path.parent.name if path.suffix == ".new" else path.name.partition(".")[0]
            if path.suffix == ".new" or (path.suffix == ".safetensors" and at > manifests.get(group, at)):
                return _INSIDE
        return _BETWEEN if self.steps() else _STARTING


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool], poll_s: float) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(poll_s)
    return False


def kill_once(folder: Path, number: int, start_s: float, draw: random.Random) -> str | None:
    """Starts or resumes the training and kills it at a moment of its own; what that was, None if it ended before."""
    files = Files(folder / "session")
    turn = number % _KILLS_PER_SESSION
    environ = environment(folder)
    command = [*executable(), "train", "session", *_ARGUMENTS]
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if turn == 0:  # anywhere in the start and the first visits
            time.sleep(draw.uniform(0, 1.2 * start_s))
        elif not wait_for(process, lambda: files.steps() >= 2 * _STEPS * turn / _KILLS_PER_SESSION, 0.002):
            return None
        elif number % 3 == 0:
            time.sleep(draw.uniform(0, 0.3))
        elif number % 3 == 1:
            manifests = files.session.glob("groups/*/manifest.json")
            aside = [aside_path(path, process.pid) for path in manifests]
            if not wait_for(process, lambda: any(map(os.path.exists, aside)), 0):
                return None
        else:
            slots = sorted(files.session.glob("stages/block*"))
            before_times = [path.stat().st_mtime_ns for path in slots]
            if not wait_for(process, lambda: [p.stat().st_mtime_ns for p in slots] != before_times, 0):
                return None
            time.sleep(draw.uniform(0, 0.01))
        if process.poll() is not None:
            return None
    finally:
        process.kill()
        process.wait()
    return files.interrupted()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=100)
    options = made.parse_args()
    num_kills = 6 if options.quick else options.kills
    draw = random.Random(0)
    found: Counter[str] = Counter()
    equal, different, damaged = 0, 0, 0
    with temporary_folder() as folder:
        edgetrain(folder, "train", "session", *_ARGUMENTS, "--visits", "1").require()  # fills the cache of probes
        shutil.rmtree(folder / "session")
        reference = edgetrain(folder, "train", "session", *_ARGUMENTS).require()
        digest = reference.value["digest"]
        start_s = reference.seconds - reference.value["seconds"]
        progress(f"uninterrupted: {digest[:16]}, start {start_s:.1f} s, training {reference.value['seconds']:.1f} s")
        while found.total() < num_kills:
            shutil.rmtree(folder / "session", ignore_errors=True)
            for turn in range(_KILLS_PER_SESSION):
                if found.total() == num_kills:
                    break
                moment = kill_once(folder, found.total() // _KILLS_PER_SESSION * 10 + turn, start_s, draw)
                if moment is None:
                    break
                found[moment] += 1
                if moment != _CREATING:
                    verified = edgetrain(folder, "verify", "session")
                    damaged += verified.exit_code != 0
            last = edgetrain(folder, "train", "session", *_ARGUMENTS)
            same = last.exit_code == 0 and last.value["digest"] == digest
            equal, different = equal + same, different + (not same)
            progress(f"{found.total()} kills, digests equal {equal}, different {different}: {dict(found)}")
            if not same:
                progress(f"exit code {last.exit_code}: {last.value or last.stderr}")
    bar = {kind: "#" * round(40 * found[kind] / max(found.values())) for kind in found}
    report(
        options.out, f"kill -9 at {num_kills} moments", ["interrupted", "kills", ""],
        [[kind, found[kind], bar.get(kind, "")] for kind in (_CREATING, _STARTING, _BETWEEN, _INSIDE)],
        f"after the first commit: {found[_BETWEEN] + found[_INSIDE]}; inside a write or commit: {found[_INSIDE]}",
        f"sessions that ended with the uninterrupted digest: {equal} of {equal + different}",
        f"kills after which the session did not verify: {damaged}",
    )  # fmt: skip
    sys.exit(1 if different or damaged else 0)


if __name__ == "__main__":
    main()
