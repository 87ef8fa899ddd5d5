"""A program that trains a stack of its own: it stops, resumes, and is refused another model or setting."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import edgetrain
import edgetrain.api
from edgetrain.errors import BudgetInfeasible, UsageError
from edgetrain.models.stack import describe, spec_of
from edgetrain.training import create
from tests import stacks
from tests.stacks import BATCH, CLASSES, Block, stack, whole

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = stacks.quiet


def test_a_program_trains_stops_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgetrain.api, "_warned", False)
    made = stack(0.2)
    changes = {"train.batch_size": BATCH, "train.micro_batch": 3}
    with pytest.warns(UserWarning, match="imported before") as said:
        one = edgetrain.Training(lambda: made, tmp_path / "a", memory_budget="2GiB", steps=4, **changes)
        edgetrain.Training(made, tmp_path / "b", memory_budget="2GiB", steps=4, **changes)
    assert len(said) == 1 and said[0].filename == __file__
    plan = one.plan()
    assert plan.peak_bytes == sum(plan.owners.values()) < 2 << 30
    state = torch.get_rng_state()
    with pytest.raises(UsageError, match="no session yet"):
        one.state_dict()
    assert one.train(steps=1)["status"] == "partial"
    assert torch.equal(state, torch.get_rng_state())
    resumed = edgetrain.Training(made, tmp_path / "a")  # budget and settings are the session's
    summary = resumed.train()
    assert (summary["status"], summary["step"]) == ("complete", 4)
    assert summary["peak_bytes"] <= summary["budget_bytes"]
    whole_run = edgetrain.Training(made, tmp_path / "b", memory_budget="1GiB", steps=4, **changes).train()
    assert whole_run["digest"] == summary["digest"]
    model = whole(made)
    model.load_state_dict(resumed.state_dict())
    with pytest.raises(UsageError, match=re.escape("head.weight is [3, 12] in the stack, and [3, 24] in")):
        narrow = dataclasses.replace(made, head=lambda: nn.Linear(12, CLASSES))
        edgetrain.Training(narrow, tmp_path / "a")
    with pytest.raises(UsageError, match="the stack has 3 blocks, and the session 4"):
        edgetrain.Training(dataclasses.replace(made, blocks=[Block] * 3), tmp_path / "a")
    with pytest.raises(UsageError, match=r"train\.batch_size"):
        edgetrain.Training(made, tmp_path / "a", **{"train.batch_size": 5})
    with pytest.raises(BudgetInfeasible):
        edgetrain.Training(made, tmp_path / "a", memory_budget="50MiB").plan()


def test_a_live_stack_leaves_the_session_its_file(tmp_path: Path) -> None:
    made, source = stack(), f"{tmp_path}/my.py:build"
    create(tmp_path / "s", spec_of(describe(made), source, {}, {}), None, dataset=made)  # type: ignore[arg-type]
    assert edgetrain.Training(made, tmp_path / "s", memory_budget="1GiB").spec.data.source == source


def test_settings_that_are_none(tmp_path: Path) -> None:
    made = stack()
    for changes, message in (
        ({"train.batchsize": 3}, "did you mean 'train.batch_size'"),
        ({"model.depth": 3}, "is no table for a stack"),
        ({"train.objective": "diffusion_blocks"}, "exact objective"),
        ({}, "needs memory_budget"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            edgetrain.Training(made, tmp_path / "s", **changes)


def test_the_front_of_the_package_is_light() -> None:
    code = "import sys, edgetrain; edgetrain.Stack; edgetrain.Training; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="Stacks"):
        edgetrain.Stacks  # noqa: B018
