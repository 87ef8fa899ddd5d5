"""What the benchmarks share: edgetrain run and measured from outside, synthetic data, tables."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.meter import TreeMeter

MIB = 1 << 20
INFEASIBLE = 3
_NAMED_BUDGET = re.compile(r"--memory-budget (\d+)MiB")


@dataclass(frozen=True)
class Outcome:
    """A command that ended. ``peak_bytes``: of its process tree, the larger of all samples of the sum and every
    process's own high-water mark; ``value``: the JSON object it printed, empty if none; ``cpu_s``: of all of them."""

    exit_code: int
    value: dict[str, Any]
    peak_bytes: int
    seconds: float
    stderr: str
    cpu_s: float

    @property
    def named_budget_bytes(self) -> int:
        """The budget that a refusal says would do, 0 if it names none."""
        found = _NAMED_BUDGET.search(self.value.get("hint", ""))
        return int(found[1]) * MIB if found else 0

    def require(self) -> Outcome:
        """Itself, if the command succeeded."""
        if self.exit_code != 0:
            raise SystemExit(f"exit code {self.exit_code}: {self.value or self.stderr}")
        return self


def executable() -> list[str]:
    """The console script of this interpreter's environment; of a source tree that is not installed, its function."""
    beside = Path(sys.executable).with_name("edgetrain")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-c", "from edgetrain.cli.main import run; run()"]


def environment(folder: Path) -> dict[str, str]:
    """For commands: probes cached in ``folder`` alone. Idle threads sleep instead of spinning, so that what else
    runs on the machine costs time only; memory does not depend on it."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}


def edgetrain(folder: Path, *arguments: str, timeout_s: float = 3600, poll_s: float = 0.01) -> Outcome:
    """Runs ``edgetrain ARGUMENTS --json`` in ``folder`` and measures its process tree, every ``poll_s``: a hundred
    times a second takes an eighth of a core, and is for tables of memory."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", dir=folder) as out, tempfile.TemporaryFile("w+", dir=folder) as err:
        command = [*executable(), *arguments, "--json"]
        process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=out, stderr=err)
        end = threading.Timer(timeout_s, os.kill, (process.pid, signal.SIGKILL))
        end.start()
        with TreeMeter(process.pid, poll_s=poll_s) as meter:
            try:
                _, status, used = os.wait4(process.pid, 0)  # its own share, whatever runs beside it
            except BaseException:
                process.kill()
                os.waitpid(process.pid, 0)
                raise
            finally:
                end.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        printed, complaint = out.read(), err.read()
    try:
        value = json.loads(printed)
    except ValueError:
        value = {}
    own = value.get("peak_bytes", 0)  # the last milliseconds are between two samples
    peak_bytes = max(meter.peak_bytes, own, *meter.high_water_bytes.values(), 0)
    seconds = time.monotonic() - began
    return Outcome(process.returncode, value, peak_bytes, seconds, complaint, used.ru_utime + used.ru_stime)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder on a disk, not in memory, where $TMPDIR says; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="edgetrain-benchmark-") as name:
        yield Path(name).resolve()


def write_idx(folder: Path, size: int, num_images: int = 1024, num_classes: int = 10) -> Path:
    """Random grey images of ``size`` x ``size`` pixels as an IDX data set."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    for prefix in ("train", "t10k"):
        pixels = noise.randbytes(num_images * size * size)
        header = struct.pack(">4I", 0x0803, num_images, size, size)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = bytes(i % num_classes for i in range(num_images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x0801, num_images) + labels)
    return folder


def write_text(path: Path, num_words: int = 100_000) -> Path:
    """Words of random letters."""
    noise = random.Random(0)
    words = ("".join(noise.choices("etaoinshrdlu", k=noise.randint(1, 9))) for _ in range(num_words))
    path.write_text("\n".join(" ".join(line) for line in zip(*[words] * 10, strict=False)) + "\n")
    return path


def settings(changes: dict[str, object]) -> list[str]:
    """{"train.steps": 3} -> ["--set", "train.steps=3"]."""
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def parser(description: str | None) -> argparse.ArgumentParser:
    """With what every benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="FILE.md", help="write the table to this file too")
    made.add_argument("--quick", action="store_true", help="a small part, to see that it works")
    return made


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(out: Path | None, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *notes: str) -> None:
    """Prints a markdown table with notes below it, and writes it to ``out``."""
    lines = [f"## {title}", "", _row(columns), _row(["---"] * len(columns)), *map(_row, rows), ""]
    text = "\n".join([*lines, *(f"- {note}" for note in notes)])
    print(text, flush=True)
    if out is not None:
        out.write_text(text + "\n")


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.1f}"
