"""Blocks trained by ONNX Runtime: what torch's training does, in a process without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import devices
from edgetrain.blockwise import BlockTrainer
from edgetrain.data import open_dataset
from edgetrain.engine import Engine, Step
from edgetrain.errors import BudgetInfeasible, UsageError
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.optim import AdamW
from edgetrain.parameters import block_shapes
from edgetrain.plan import Choice, Probe
from edgetrain.recipe import resolve
from edgetrain.schedule import Update
from edgetrain.session import Session
from edgetrain.spec import OptimizerSpec, Spec, TextModelSpec
from edgetrain.stages import group_of_block
from edgetrain.training import create
from edgetrain.training_data import training_batches
from exporters import ort_training
from exporters.ort_training import BlockMath, OrtTrainer, adamw
from tests.exporters.common import ROOT, shapes_of
from tests.test_dit import run
from tests.text_families import TEXT, Cycling, small

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {
    "model": {"width": 32, "depth": 4, "heads": 2, "patch": 4, "image_shape": [1, 8, 8], "num_classes": 10},
    "data": {"source": "digits"},
    "diffusion_blocks": {"num_blocks": 2},
    "train": {"steps": 40, "batch_size": 16, "micro_batch": 16, "visit_steps": 10, "seed": 2},
    "optimizer": {"lr": 1e-3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "paper, everything shared but the layers": {
        "diffusion_blocks.preset": "paper",
        "diffusion_blocks.codebook": "frozen",
    },
    "one stream, log-likelihoods": {"diffusion_blocks.streams": 1, "diffusion_blocks.skip": True},
    "frozen stems": {"diffusion_blocks.stem": "frozen"},
    "uneven blocks": {"model.depth": 3},
    "neighbours": {"model.neighbours": 1},
    "dit": {"model.family": "dit"},
    "dit, neighbours": {"model.family": "dit", "model.neighbours": 1},
    "dit, paper": {"model.family": "dit", "diffusion_blocks.preset": "paper", "model.depth": 3},
}
_FROZEN = {"diffusion_blocks__codebook": "frozen"}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("masked", {"model__neighbours": 2}),
    "masked, shared": ("masked", {"diffusion_blocks__preset": "paper"}),
    "ar": ("ar", {}),
    "ar, paper": ("ar", {"diffusion_blocks__preset": "paper", **_FROZEN}),
    "ar, nothing joined": ("ar", {"diffusion_blocks__joined": False, "model__previous": False, "model__depth": 3}),
    "recurrent": ("recurrent", {"model__prelude": 2}),
    "recurrent, paper": ("recurrent", {"diffusion_blocks__preset": "paper", **_FROZEN}),
}
_LONG = {"train__steps": 40, "train__visit_steps": 10, "optimizer__lr": 1e-3}
SPECS = {name: resolve(BASE, changes) for name, changes in VARIANTS.items()} | {
    name: small(family, **_LONG, **changes) for name, (family, changes) in TEXTS.items()
}


def spec_of(changes: dict[str, Any] | None = None) -> Spec:
    return resolve(BASE, changes)


def new_session(path: Path, spec: Spec) -> Session:
    return create(path, spec, Probe(block_shapes(spec), None, 0, 0, {}, {}, None), "0123456789")


def dataset_of(spec: Spec, scratch: Path) -> Any:
    return Cycling() if isinstance(spec.model, TextModelSpec) else open_dataset("digits", "train", scratch)


def losses(session: Session, backend: str, num_steps: int) -> list[float]:
    """By steps of visits to all blocks in turn."""
    spec = session.spec
    batches = training_batches(spec, dataset_of(spec, session.path))
    if backend == "ort":
        trainer: Any = OrtTrainer(session, BlockMath(spec, session.shapes, 1), batches)
    else:
        device = devices.open_device("cpu", session.scratch)
        trainer = BlockTrainer(
            session, device, Choice(spec.train.batch_size, "keep", True), diffusion_blocks(spec, batches)
        )
    engine = Engine(session, trainer, spec.train.micro_batch)
    engine.warm_up()
    found: list[Step] = []
    with session.store.lock({group_of_block(spec, block) for block in range(spec.num_blocks)}):
        for _ in range(0, num_steps, spec.train.visit_steps):
            for block in range(spec.num_blocks):
                engine.visit(block, spec.train.visit_steps, found.append)
        session.store.flush()
    return [step.loss for step in found if step.loss is not None]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_shapes_are_the_modules(spec: Spec) -> None:
    found = {kind: {name: list(shape) for name, shape in named.items()} for kind, named in block_shapes(spec).items()}
    assert found == shapes_of(spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_losses_are_those_of_torch(spec: Spec, tmp_path: Path) -> None:
    found = [losses(new_session(tmp_path / one, spec), one, 40) for one in ("ort", "torch")]
    assert len(found[0]) == 40 * spec.num_blocks
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)
    still = replace(spec, optimizer=replace(spec.optimizer, lr=1e-9))
    unmoved = losses(new_session(tmp_path / "still", still), "ort", 40)
    assert np.abs(np.subtract(found[0], unmoved)).max() > 0.05, "or training changed nothing"


@pytest.mark.slow
def test_losses_are_those_of_torch_over_200_steps(tmp_path: Path) -> None:
    """A block of width 128, batches of 8."""
    spec = spec_of({"model.width": 128, "train.batch_size": 8, "train.micro_batch": 8, "train.steps": 200,
                    "optimizer.lr": 1e-4})  # fmt: skip
    found = [losses(new_session(tmp_path / one, spec), one, 200) for one in ("ort", "torch")]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_micro_batches_add_up(tmp_path: Path) -> None:
    spec = spec_of()
    session = new_session(tmp_path / "s", spec)
    batches = training_batches(spec, open_dataset("digits", "train", session.path))
    trainer = OrtTrainer(session, BlockMath(spec, session.shapes, 1), batches)
    trainer.enter(1)
    totals = []
    for micro_batch in (16, 5, 1):
        loss = trainer._accumulate(3, 16, micro_batch)
        totals.append((loss, trainer.math.gradient.copy()))
    for loss, gradient in totals[1:]:
        assert loss == pytest.approx(totals[0][0], rel=1e-6)
        np.testing.assert_allclose(gradient, totals[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("is_decayed", [False, True])
def test_an_update_is_torchs(number: int, is_decayed: bool) -> None:
    random, spec = np.random.default_rng(number), OptimizerSpec()
    arrays = [random.standard_normal(100_000).astype(np.float32) for _ in range(3)]
    arrays.append(np.abs(random.standard_normal(100_000)).astype(np.float32))
    expected = [torch.from_numpy(array.copy()) for array in arrays]
    AdamW(spec).update(*([one] for one in expected), number=number, lr=0.01, decays=is_decayed)
    adamw(spec, Update(0.01, number, is_decayed), *arrays)
    for array, tensor in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-6, atol=1e-7)


_TRAIN = """
import sys
from edgetrain.cli.main import main
main(sys.argv[1:], standalone_mode=False)
assert "torch" not in sys.modules, "torch was imported"
"""


def arguments(session: Path, *more: object) -> list[str]:
    sizes = {"model.width": 128, "model.depth": 3, "train.batch_size": 8, "train.micro_batch": 0,
             "train.visit_steps": 10}  # fmt: skip
    changes = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    given = ["train", session, "--recipe", "vit-digits", "--memory-budget", "200MiB", "--threads", "1",
             "--backend", "ort", *changes, *more]  # fmt: skip
    return list(map(str, given))


def test_without_torch_within_its_budget_and_what_comes_of_it(tmp_path: Path) -> None:
    """A block of width 128: wholly within 200 MiB. Torch goes on with it, and it leaves as ONNX."""
    session = tmp_path / "s"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _TRAIN, *arguments(session, "--steps", 20)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "GraphTransformer" not in done.stderr
    summary = run(*arguments(session, "--steps", 30))
    assert summary["peak_bytes"] <= 200 << 20
    assert summary["peak_bytes"] == pytest.approx(summary["plan_peak_bytes"], rel=0.1)
    assert summary["step"] == 30
    rows = run("export", session, "--to", tmp_path / "x", "--memory-budget", "220MiB")["parity"]
    assert all(row["passed"] for row in rows)
    assert run("train", session, "--steps", 40, "--memory-budget", "400MiB", "--threads", 1)["step"] == 40


@pytest.mark.parametrize("family", ["dit", "masked", "ar", "recurrent"])
def test_every_family_without_torch(family: str, tmp_path: Path) -> None:
    """Plan, training and what comes of it, by commands; torch goes on with it."""
    session, text = tmp_path / "s", tmp_path / "text.txt"
    text.write_text(TEXT)
    recipe = ["dit-digits"] if family == "dit" else [f"{family}-text", "--data", str(text)]
    sizes = {"model.width": 32, "train.batch_size": 8, "train.visit_steps": 4, "train.micro_batch": 0}
    changes = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    begun = ["train", str(session), "--recipe", *recipe, *changes, "--memory-budget", "200MiB", "--backend", "ort"]
    command = [sys.executable, "-c", _TRAIN, *begun, "--steps", "4", "--threads", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["status"], summary["step"]) == ("complete", 4)
    assert summary["peak_bytes"] == pytest.approx(summary["plan_peak_bytes"], rel=0.1)
    more = ("--memory-budget", "400MiB", "--threads", 1)
    assert run("train", session, "--steps", 6, *more)["step"] == 6
    assert run("train", session, "--steps", 8, *more, "--backend", "ort")["step"] == 8
    assert all(row["passed"] for row in run("export", session, "--to", tmp_path / "x", *more[:2])["parity"])


def test_a_kill_changes_nothing(tmp_path: Path) -> None:
    whole = run(*arguments(tmp_path / "whole", "--steps", 60))
    session = tmp_path / "killed"
    start = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"
    command = [sys.executable, "-c", start, *arguments(session, "--steps", 60)]
    killed = 0
    for seed in range(3):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        metrics, size = session / "metrics.jsonl", 0
        while process.poll() is None and not size:
            size = metrics.stat().st_size if metrics.exists() else 0
            time.sleep(0.01)
        time.sleep(0.1 * seed)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if metrics.exists():
            metrics.unlink()
    assert killed
    assert run(*arguments(session, "--steps", 60))["digest"] == whole["digest"]
    assert json.loads((session / "plan.json").read_text())["budget_bytes"] == 200 << 20


@pytest.mark.parametrize(
    "changes",
    [{"train.objective": "exact"}, {"diffusion_blocks.auxiliary": 0.5}, {"diffusion_blocks.codebook": "shared"}],
)
def test_what_it_does_not_train(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime trains"):
        ort_training.check(spec_of(changes))


def test_another_build_of_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ort_training.check(spec_of())
    monkeypatch.setattr(ort_training, "_builder", lambda: None)
    with pytest.raises(UsageError, match="it exists for Linux on x86-64"):
        ort_training.check(spec_of())


def test_a_budget_that_is_too_small_is_refused() -> None:
    spec = spec_of()
    math = BlockMath(spec, block_shapes(spec), 1)
    with pytest.raises(BudgetInfeasible, match="the least this training can do with"):
        math.plan(50 << 20)
    assert math.plan(4 << 30).choice.micro_batch == 16
    assert math.plan(4 << 30, 5).choice.micro_batch == 5
    with pytest.raises(BudgetInfeasible) as refused:  # what was asked for is not changed
        math.plan(50 << 20, 16, exactly=True)
    assert "leave train.micro_batch out" in refused.value.hint


_LARGER = ["--recipe", "dit-digits", "--set", "model.width=128", "--set", "model.depth=3", "--set", "model.patch=1",
           "--set", "train.visit_steps=2", "--backend", "ort", "--threads", "1"]  # fmt: skip


def test_what_does_not_fit_is_not_measured_and_a_smaller_budget_goes_on(tmp_path: Path) -> None:
    """A measurement keeps what it took. A session whose micro-batch does not fit any more takes a smaller one."""
    first = run("train", tmp_path / "s", *_LARGER, "--memory-budget", "252MiB", "--steps", 2)
    assert 1 < first["micro_batch"] < 64
    assert first["peak_bytes"] == pytest.approx(first["plan_peak_bytes"], rel=0.1)
    more = ("--backend", "ort", "--threads", 1)
    second = run("train", tmp_path / "s", "--memory-budget", "140MiB", "--steps", 4, *more)
    assert second["micro_batch"] < first["micro_batch"] and second["step"] == 4
    assert second["peak_bytes"] < 140 << 20


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    said = run(*arguments(tmp_path / "s", "--activations", "recompute"), exit_code=2)
    assert "keeps activations" in said["message"]
