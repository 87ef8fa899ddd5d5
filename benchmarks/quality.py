"""What the comparisons of quality share: arms trained and scored once each, resumable; tables and learning curves.

An arm is a way to train one model. It is trained at a quarter, at half and at all of its steps, each a training of its
own with its own schedule, so that a curve shows what more steps would buy; the learning rate is chosen among a few by
the validation score at a quarter of the steps. What was scored is in ``scores.jsonl`` in the study's folder: a run
that was interrupted goes on from there; a training that was interrupted goes on from its last commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import edgetrain, mib, parser, progress, settings

Scores = dict[str, float]
"""By readout or metric."""

Score = Callable[[Path, Path], Scores]
"""(folder, session) -> the scores of a trained session."""


COLUMNS = (["arm", "lr", "steps", "validation at 1/4, 1/2, 1"], ["above the floor MiB", "training s"])
"""Of ``Study.rows``, around those of the metrics."""

_TINY = {
    "model.width": 8, "model.depth": 1, "model.heads": 1, "diffusion_blocks.num_blocks": 1, "train.batch_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """``times``: how many times the study's steps it gets. ``lrs``: what is tried. ``seeds``: at most so many."""

    name: str
    changes: Mapping[str, object]
    times: float = 1.0
    lrs: Sequence[float] = (1e-3, 2e-3)
    seeds: int = 3


@dataclass(frozen=True)
class Result:
    arm: str
    seed: int
    steps: int
    lr: float
    split: str
    scores: Scores
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)


class Study:
    """A folder with the sessions and scores of one comparison."""

    def __init__(
        self, how: argparse.Namespace, recipe: str, data: Path, steps: int, *, chosen_by: Sequence[str], maximise: bool
    ) -> None:
        """``how``: of ``quality_parser``. ``chosen_by``: readouts, of which an arm has one; rates are chosen by
        it, and curves show it. The best of several would favour the arms that have many."""
        self.folder, self.recipe, self.data = how.folder.resolve(), recipe, data.resolve()
        self.steps, self.budget, self.jobs, self.where = steps, how.memory_budget, how.jobs, where(how)
        self.chosen_by, self.maximise = chosen_by, maximise
        self._writing = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / "scores.jsonl"
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self.results = [Result(**json.loads(line)) for line in lines]

    def result(  # noqa: PLR0917
        self, arm: Arm, seed: int, part: float, lr: float, split: str, score: Score
    ) -> Result:
        """Trains ``part`` of the arm's steps and scores it, unless that is done already."""
        steps = max(1, round(self.steps * arm.times * part))
        for one in self.results:
            made = (one.arm, one.seed, one.steps, one.lr, one.split, one.extra.get("spec"))
            if made == (arm.name, seed, steps, lr, split, self.identity(arm)):
                return one
        session = self.session(arm, seed, part, lr)
        changes = {**arm.changes, "train.seed": seed, "train.steps": steps, "optimizer.lr": lr}
        created = [
            "--recipe", self.recipe, "--data", str(self.data), "--memory-budget", self.budget, *settings(changes),
        ]  # fmt: skip
        arguments = [] if (session / "session.json").exists() else created
        trained = edgetrain(
            self.folder, "train", str(session), *arguments, *self.where, timeout_s=1e6, poll_s=0.5
        ).require()
        scores = score(self.folder, session)
        extra: dict[str, Any] = {"peak_bytes": trained.value["peak_bytes"], "spec": self.identity(arm)}
        if arguments and split == "validation":  # whole, not the rest of a training that was interrupted
            extra["cpu_s"] = trained.cpu_s
        scored = Result(arm.name, seed, steps, lr, split, scores, trained.value["seconds"], extra)
        with self._writing, self._log.open("a") as log:
            log.write(json.dumps(scored.__dict__) + "\n")
        self.results.append(scored)
        progress(f"{arm.name}, seed {seed}, {steps} steps, lr {lr:g}, {scored.seconds:.0f} s: {split} {scores}")
        return scored

    def session(self, arm: Arm, seed: int, part: float, lr: float) -> Path:
        """Where an arm is trained."""
        steps = max(1, round(self.steps * arm.times * part))
        name = f"{arm.name}-{seed}-{steps}-{lr:g}-{self.identity(arm)}"
        return self.folder / name.replace(" ", "_").replace("/", "")

    def identity(self, arm: Arm) -> str:
        return identity(self.recipe, arm.changes)

    def lr(self, arm: Arm, score: Score) -> float:
        """The best of the arm's learning rates, at a quarter of its steps, by validation."""
        if len(arm.lrs) == 1:
            return arm.lrs[0]
        tried = {lr: self._chosen(self.result(arm, 0, 0.25, lr, "validation", score).scores) for lr in arm.lrs}
        return (max if self.maximise else min)(tried, key=lambda lr: tried[lr])

    def run(self, arms: Sequence[Arm], seeds: Sequence[int], validate: Score, test: Score) -> None:
        """Everything: learning rates, curves of the first seed, and all seeds at full length, tested once."""
        with ThreadPoolExecutor(self.jobs) as pool:
            found = pool.map(lambda arm: self.lr(arm, validate), arms)
            self.rates = rates = {arm.name: lr for arm, lr in zip(arms, found, strict=True)}
            whole = [(arm, seed) for seed in seeds for arm in arms if seed < arm.seeds]
            # The longest first, so that the others fill what is left.
            trainings = [(arm, seed, 1.0) for arm, seed in whole]
            trainings += [(arm, seeds[0], part) for part in (0.5, 0.25) for arm in arms]
            for made in pool.map(lambda one: self.result(*one, rates[one[0].name], "validation", validate), trainings):
                assert made
            for made in pool.map(lambda one: self.result(*one, 1.0, rates[one[0].name], "test", test), whole):
                assert made

    def floor_bytes(self, like: Arm) -> int:
        """The peak of the same command on a model that is next to nothing: what the runtime itself takes."""
        arm = Arm("floor", {**like.changes, **_TINY}, times=2 / self.steps)
        return int(self.result(arm, 0, 1.0, 1e-3, "none", lambda *_: {}).extra["peak_bytes"])

    def cpu_s_a_step(self, arm: Arm) -> float:
        """Of the arm's trainings that were not interrupted, their beginning included: what else runs on the machine
        matters less to it than to seconds."""
        timed = [
            one for one in self.results
            if "cpu_s" in one.extra and (one.arm, one.extra["spec"]) == (arm.name, self.identity(arm))
        ]  # fmt: skip
        if not timed:
            raise SystemExit(f"all trainings of {arm.name!r} were interrupted: delete {self.folder} and begin again")
        return sum(one.extra["cpu_s"] for one in timed) / sum(one.steps for one in timed)

    def at(self, arm: Arm, split: str, part: float = 1.0) -> list[Result]:
        """All seeds of an arm, at its chosen learning rate."""
        steps = max(1, round(self.steps * arm.times * part))
        found = [
            one for one in self.results
            if (one.arm, one.steps, one.lr, one.split, one.extra.get("spec"))
            == (arm.name, steps, self.rates[arm.name], split, self.identity(arm))
        ]  # fmt: skip
        return sorted(found, key=lambda one: one.seed)

    def rows(self, arms: Sequence[Arm], metrics: Sequence[str], digits: int = 2) -> Iterator[list[object]]:
        """Arm, learning rate, steps, curve of the first seed, then mean and deviation of each metric on the test set,
        the most memory that training took above the floor, and seconds of training: ``COLUMNS`` before and after the
        metrics."""
        floor = self.floor_bytes(arms[0])
        for arm in arms:
            tested = self.at(arm, "test")
            curve = [
                self._chosen(self.at(arm, "validation", part)[0].scores) for part in (0.25, 0.5, 1.0)
            ]  # fmt: skip
            values = [spread([one.scores[m] for one in tested if m in one.scores], digits) for m in metrics]
            seconds = statistics.mean(one.seconds for one in self.at(arm, "validation"))
            yield [
                arm.name, f"{self.rates[arm.name]:g}", tested[0].steps,
                " ".join(f"{value:.{digits}f}" for value in curve), *values,
                mib(max(one.extra["peak_bytes"] for one in self.at(arm, "validation")) - floor), f"{seconds:.0f}",
            ]  # fmt: skip

    def _chosen(self, scores: Scores) -> float:
        return next(scores[name] for name in self.chosen_by if name in scores)

    def figure(self, arms: Sequence[Arm], title: str, label: str, path: Path) -> None:
        """Learning curves of the first seed on the validation split, steps doubled from point to point."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4.2))
        for arm in arms:
            points = [
                (one[0].steps, self._chosen(one[0].scores))
                for one in (self.at(arm, "validation", part) for part in (0.25, 0.5, 1.0))
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=arm.name)
        axes.set(xscale="log", xlabel="optimizer steps (of each block)", ylabel=label, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)


def identity(recipe: str, changes: Mapping[str, object]) -> str:
    """Of all that a name does not say: a preset or a recipe may come to mean something else."""
    from edgetrain.recipe import load_recipe, parse_changes, resolve, to_toml

    parsed = parse_changes(tuple(f"{key}={value}" for key, value in changes.items()))
    return hashlib.sha256(to_toml(resolve(load_recipe(recipe), parsed)).encode()).hexdigest()[:8]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def difference(a: Sequence[float], b: Sequence[float], digits: int) -> str:
    """Mean of a - b, and the standard error of that difference over independent seeds."""
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return f"{mean:+.{digits}f}"
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def split_text(source: Path, folder: Path) -> tuple[Path, Path]:
    """The first nine tenths of a text, of which a training holds a twentieth out for choices, and the rest, to test."""
    folder.mkdir(parents=True, exist_ok=True)
    fit, test = folder / "fit.txt", folder / "test.txt"
    if not test.exists():
        text = source.read_text()
        cut = text.index("\n", len(text) * 9 // 10) + 1
        fit.write_text(text[:cut])
        test.write_text(text[cut:])
    return fit, test


def where(how: argparse.Namespace) -> list[str]:
    """On which device, and with how many threads: what both training and scoring take."""
    return ["--threads", str(how.threads), "--device", how.device]


def text_scores(test: Path | None, where: Sequence[str], *more: str) -> Score:
    """Bits a character of what was held out, or of another text; the numbers of runs of a core are told apart."""

    def scored(folder: Path, session: Path) -> Scores:
        data = [] if test is None else ["--data", str(test)]
        found = edgetrain(folder, "evaluate", str(session), *data, *where, *more).require()
        return {
            row["readout"] + (f", {row['loops']} runs" if "loops" in row else ""): row["value"]
            for row in found.value["results"]
        }

    return scored


def quality_parser(description: str | None) -> argparse.ArgumentParser:
    """What every comparison takes."""
    made = parser(description)
    folder = Path(sys.argv[0]).stem.replace("_", "-")
    made.add_argument("--folder", type=Path, default=Path(folder), help="sessions and scores; goes on there")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--device", default="cpu", help="of trainings and scores")
    made.add_argument("--memory-budget", default="1GiB", help="of each training")
    made.add_argument("--jobs", type=int, default=1, help="how many trainings run at a time")
    made.add_argument("--steps", type=int, help="of each block")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the learning curves")
    return made


def split_train_set(source: Path, folder: Path, held_out: int) -> tuple[Path, Path]:
    """Two IDX folders with the same training images, all but the last ``held_out`` of ``source``: the first has these
    as its test images, for choices; the second has the test images of ``source``."""
    import gzip

    folder = folder / f"{held_out}-held-out"
    choosing, testing = folder / "choosing", folder / "testing"
    if testing.exists():
        return choosing, testing

    def content(name: str) -> bytes:
        with gzip.open(source / f"{name}.gz") as file:
            return file.read()

    aside = folder / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    for kind, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
        data = content(f"train-{kind}")
        count = int.from_bytes(data[4:8], "big")
        item = (len(data) - header) // count
        cut = header + (count - held_out) * item
        rest = data[8:header]
        parts = {
            "train": data[:4] + (count - held_out).to_bytes(4, "big") + rest + data[header:cut],
            "t10k": data[:4] + held_out.to_bytes(4, "big") + rest + data[cut:],
        }
        for name, where in (("train", choosing), ("t10k", choosing), ("train", aside)):
            where.mkdir(parents=True, exist_ok=True)
            (where / f"{name}-{kind}").write_bytes(parts[name])
        (aside / f"t10k-{kind}").write_bytes(content(f"t10k-{kind}"))
    aside.replace(testing)
    return choosing, testing
