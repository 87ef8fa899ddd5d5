"""What doctor compares, and that it tells a wrong gradient from a right one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetrain.streamed
from edgetrain.cli.main import COMMANDS
from edgetrain.data import Dataset
from edgetrain.doctor import TOLERANCE, Diagnosis, examine
from edgetrain.models.stack import StackNetwork
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import exact_stages
from edgetrain.streamed import StreamedTrainer
from tests.cli.workplace import Workplace
from tests.language_models import cut_small, data_of, make_spec
from tests.language_models import new_session as new_language_session
from tests.stacks import DEPTH, Block, Stem, new_session, stack

pytestmark = pytest.mark.usefixtures("one_thread")


def diagnosis(tmp_path: Path, made: Any, session: Session, layers: int = 2) -> Diagnosis:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return examine(session, made, "cpu", scratch, layers)


def of_stack(tmp_path: Path, layers: int = 2, **changes: Any) -> Diagnosis:
    made = stack(**changes)
    return diagnosis(tmp_path, made, new_session(tmp_path / "s", made, train__micro_batch=4), layers)


@pytest.mark.parametrize("layers", [1, 2, DEPTH + 5])
def test_a_stack_is_bit_equal(tmp_path: Path, layers: int) -> None:
    """Over all layers with the stem, whose gradient comes through the context too."""
    found = of_stack(tmp_path, layers, dropout=0.3, noise=0.1)
    assert found.good and found.repeats and found.micro_batch == 4
    assert found.relative <= 1e-6 and found.streamed_loss == pytest.approx(found.resident_loss, rel=1e-6)
    stages = {row.stage for row in found.rows}
    expected = {f"layer{number:03d}" for number in range(max(0, DEPTH - layers), DEPTH)} | {"head"}
    assert stages == expected | ({"stem"} if layers > DEPTH else set())
    assert sum(row.bit_equal for row in found.rows) > 0.7 * len(found.rows)


LANGUAGE: dict[str, tuple[Spec, str | None]] = {
    "tied": (make_spec(), None),
    "gpt2, own output": (make_spec("gpt2", data__length=20, model__tied=False), None),
    "lora dropout": (
        make_spec(exact__train="lora", exact__rank=3, exact__dropout=0.3, exact__targets=["q_proj"]), "F32",
    ),
    "last": (make_spec(exact__train="last", exact__last_layers=2), "BF16"),
    "bf16": (make_spec(exact__weights="bf16"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("layers", [2, 3])
def test_language_models_agree_with_a_loss_in_float64(
    tmp_path: Path, name: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch.setattr)
    spec, external = LANGUAGE[name]
    found = diagnosis(tmp_path, data_of(spec), new_language_session(tmp_path / "s", spec, external), layers)
    assert found.good and 0 < found.relative <= TOLERANCE["fp32"]
    trained = {stage.name for stage in exact_stages(spec).stages if stage.trained}
    assert {row.stage for row in found.rows} <= trained
    assert any(row.stage.startswith("layer002") for row in found.rows)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_vit_agrees(tmp_path: Path, digits: Dataset, layers: int) -> None:
    spec = make_spec("vit")
    found = diagnosis(tmp_path, digits, new_language_session(tmp_path / "s", spec), layers)
    assert found.good
    assert any(row.stage == "stem" for row in found.rows) == (layers == 3)


# ------------------------------------------------------------------------------------------------ what it tells apart


def test_a_gradient_that_is_a_little_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = StreamedTrainer._collect

    def off(self: Any, number: int, carried: Mapping[str, Tensor], context: Mapping[str, Tensor]) -> None:
        for tensor in carried.values():
            if tensor.grad is not None:
                tensor.grad *= 1 + 1e-3
        collect(self, number, carried, context)

    monkeypatch.setattr(edgetrain.streamed.StreamedTrainer, "_collect", off)
    found = of_stack(tmp_path)
    assert not found.good and found.repeats
    assert 5e-4 < found.relative < 5e-3
    # The head comes before the first boundary, and layers add up what went wrong.
    worst = {stage: max(row.relative for row in found.rows if row.stage == stage) for stage in ("head", "layer003")}
    assert worst["head"] <= 1e-6 < worst["layer003"]


def test_a_lost_context_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = StreamedTrainer._collect
    monkeypatch.setattr(
        StreamedTrainer, "_collect", lambda self, number, carried, context: collect(self, number, carried, {})
    )
    found = of_stack(tmp_path, DEPTH)
    assert {row.tensor for row in found.rows if row.relative > TOLERANCE["fp32"]} >= {
        "condition.weight",
        "condition.bias",
    }
    assert all(row.relative <= 1e-6 for row in found.rows if not row.tensor.startswith("condition"))


def test_a_recomputation_that_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StackNetwork, "_draw_at", lambda *_: None)
    found = of_stack(tmp_path, dropout=0.3)
    assert not found.repeats and not found.good


class Broken(nn.Module):
    """Finite forward, and no finite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + torch.sqrt(self.weight)


def test_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    found = of_stack(tmp_path, 1, stem=Stem, blocks=[Block, Broken])
    assert not found.good
    assert [row.tensor for row in found.rows if not row.finite] == ["weight"]
    assert math.isfinite(found.streamed_loss)


# ------------------------------------------------------------------------------------------------ the command

FILE = """
import random, edgetrain, torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x) * (1 + IMPURE * random.random())

IMPURE = 0
data = [(torch.full((8,), i / 4), torch.full((8,), 1.0)) for i in range(9)]

def build():
    return edgetrain.Stack(
        blocks=[Block] * 4, loss=lambda output, target: (output - target).square().mean(), data=data
    )
"""


def test_the_command(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    assert {"doctor", "run"} <= set(COMMANDS)
    (tmp_path / "my.py").write_text(FILE)
    trained = place.json(
        "run", "my.py:build", "s", "--memory-budget", "400MiB", "--steps", 3, "--threads", 1, "--set",
        "train.batch_size=4",
    )  # fmt: skip
    found = place.json("doctor", "s", "--layers", 3, "--threads", 1)
    assert found["ok"] and found["compilers"] == [] and found["layers"] == 3 and found["peak_bytes"] > 100 << 20
    assert {row["stage"] for row in found["tensors"]} == {"layer001", "layer002", "layer003"}
    text = place.run("doctor", "s", "--threads", 1)
    assert text.returncode == 0 and "gradients are exact: " in text.stdout
    assert place.json("status", "s")["digest"] == trained["digest"], "nothing is changed"
    (tmp_path / "my.py").write_text(FILE.replace("IMPURE = 0", "IMPURE = 1"))
    impure = place.json("doctor", "s", "--threads", 1, exit_code=10)
    assert not impure["ok"] and not impure["repeats"]
    assert "DIFFERENT BITS" in place.run("doctor", "s", "--threads", 1).stdout
    place.json(*place.train(tmp_path / "blocks", "--visits", 1))
    assert "diffusion_blocks" in place.fails(2, "doctor", "blocks")
    assert "is no session" in place.fails(2, "doctor", "nothing")
