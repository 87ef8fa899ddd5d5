"""Training and use on an NVIDIA GPU: no choice changes a bit there either, numbers are the CPU's up to rounding, and
the budget is about the GPU's memory. Run where torch sees one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import devices
from devices import DeviceOutOfMemory, Tier
from edgetrain.data import Dataset
from edgetrain.doctor import examine
from edgetrain.errors import BudgetInfeasible
from edgetrain.governor import Governor
from edgetrain.plan import Choice
from edgetrain.stages import exact_stages
from tests import block_sessions, language_models, test_doctor, test_streamed, text_families
from tests.language_models import cut_small
from tests.text_families import FAMILIES, Cycling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("one_thread"),
]
MIB = 1 << 20
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["calibrated", "paper", "auxiliary", "frozen stem"])
def test_blocks_of_a_classifier(name: str, digits: Dataset, tmp_path: Path) -> None:
    spec = block_sessions.SPECS[name]
    reference = block_sessions.complete(tmp_path / "cpu", spec, digits)
    done = {}
    for activations, resident in itertools.product(("keep", "recompute", "offload"), (True, False)):
        path = tmp_path / f"{activations} {resident}"
        choice = Choice(8, activations, resident)
        done[activations, resident] = block_sessions.complete(path, spec, digits, choice=choice, device="cuda")
    states = [block_sessions.state(one.session) for one in done.values()]
    assert all(state == states[0] for state in states)
    assert len({one.digest for one in done.values()}) == 1
    first = done["keep", True]
    assert first.summary["loss"] == pytest.approx(reference.summary["loss"], rel=1e-3)
    assert done["offload", True].summary["offloaded_bytes"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_a_language_model(family: str, tmp_path: Path) -> None:
    spec = text_families.small(family)
    digests, losses = set(), []
    for device, activations in (("cpu", "keep"), ("cuda", "keep"), ("cuda", "recompute"), ("cuda", "offload")):
        path = tmp_path / f"{device} {activations}"
        text_families.new_session(path, spec)
        done = block_sessions.train_on(path, cast(Any, Cycling()), choice=Choice(8, activations, True), device=device)
        losses.append(done.summary["loss"])
        digests |= {done.digest} if device == "cuda" else set()
    assert len(digests) == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_interrupted_after_each_step_and_resumed(digits: Dataset, tmp_path: Path) -> None:
    spec = block_sessions.SPECS["calibrated"]
    whole = block_sessions.complete(tmp_path / "whole", spec, digits, device="cuda")
    block_sessions.new_session(tmp_path / "parts", spec)
    for _ in range(spec.train.steps * spec.num_blocks):
        done = block_sessions.train_on(tmp_path / "parts", digits, stop_after=1, device="cuda")
    assert done.digest == whole.digest
    assert block_sessions.state(done.session) == block_sessions.state(whole.session)


@pytest.mark.parametrize(
    "name",
    ["llama tied", "gpt2", "qwen3", "lora dropout", "bf16", "computed in bf16", "vit", "dit",
     "recurrent, back through two loops", "clipped as a whole"],
)  # fmt: skip
def test_exact_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch.setattr)
    reference = test_streamed.trained(tmp_path, name, test_streamed.PLAIN)
    expected = test_streamed.trained(tmp_path, name, test_streamed.PLAIN, "cuda")
    tolerance = 3e-2 if "bf16" in name else 1e-3
    assert expected.losses == pytest.approx(reference.losses, rel=tolerance)
    for choice, _ in test_streamed.choices(len(exact_stages(test_streamed.SPECS[name][0]).layers)):
        if choice.tiled and "bf16" in name:
            continue  # products of tiles are rounded one by one
        assert test_streamed.trained(tmp_path, name, choice, "cuda") == expected, choice


def test_a_limit_is_on_the_gpus_memory() -> None:
    device = devices.open_device("cuda")
    memory = device.memory
    budget = memory.resident_bytes() + 256 * MIB
    with Governor(budget, memory).hold(64 * MIB):
        kept = device.buffer(64 * MIB, Tier.DEVICE)
        with pytest.raises(DeviceOutOfMemory):
            device.buffer(512 * MIB, Tier.DEVICE)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.zeros(512 * MIB, dtype=torch.uint8, device=device.torch_device)
        assert 64 * MIB < memory.peak_bytes() <= budget
        assert memory.free_bytes(budget) <= 192 * MIB
    kept.release()
    with pytest.raises(BudgetInfeasible, match="are needed beside"), Governor(budget, memory).hold(1 << 40):
        pass


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path: Path) -> None:
    spec = text_families.small("ar", data__length=512, model__width=64, train__batch_size=64, train__micro_batch=64)

    class Long(Cycling):
        length = 512

        def read(self, indices: Any) -> Any:
            import numpy as np

            tokens = (indices[:, None] * 7 + np.arange(513)) % text_families.VOCABULARY
            return tokens[:, :-1], tokens[:, 1:], np.ones((len(indices), 512), np.float32)

    text_families.new_session(tmp_path / "s", spec)
    device = devices.open_device("cuda")
    device.memory.reset_peak()
    budget = device.memory.resident_bytes() + 600 * MIB
    plan = block_sessions.Plan(budget, 0, 0, {}, Choice(64, "keep", True), 0.0, 0, 0, 0, 1)
    session = block_sessions.Session.open(tmp_path / "s")
    summary = block_sessions.train(
        session, session.spec, plan, cast(Any, Long()), "cuda", visits=None, blocks=[0, 1],
        on_report=lambda report: None, stop=lambda: False,
    )  # fmt: skip
    assert summary["status"] == "complete"
    assert summary["retries"] > 0
    assert summary["peak_bytes"] <= budget


def command(*arguments: str, expected: int = 0) -> dict[str, Any]:
    code = "from edgetrain.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    session, text = str(tmp_path / "s"), tmp_path / "text.txt"
    text.write_text(text_families.TEXT * 4)
    made = [
        "--recipe",
        "ar-text",
        "--data",
        str(text),
        "--device",
        "cuda",
        "--steps",
        "4",
        "--set",
        "train.visit_steps=2",
    ]
    refused = command("train", session, *made, "--memory-budget", "300MiB", expected=3)
    assert "largest" in refused["message"] or "least" in refused["message"]
    trained = command("train", session, *made, "--memory-budget", "3GiB", "--host-memory", "8GiB")
    assert trained["status"] == "complete"
    assert trained["plan_peak_bytes"] / 1.3 < trained["peak_bytes"] <= 3 << 30
    assert trained["host_peak_bytes"] > 300 * MIB
    evaluated = command("evaluate", session, "--device", "cuda", "--limit", "8")
    on_cpu = command("evaluate", session, "--device", "cpu", "--limit", "8", "--memory-budget", "2GiB")
    for mine, its in zip(evaluated["results"], on_cpu["results"], strict=True):
        assert mine["value"] == pytest.approx(its["value"], rel=1e-3)
    written = command("generate", session, "--prompt", "In", "--max-tokens", "8", "--device", "cuda")
    assert written["tokens"] == 8
    more = ["--steps", "6", "--device", "cuda"]
    broken = command("train", session, *more, "--host-memory", "50MiB", expected=8)
    assert "host" in broken["message"]


@pytest.mark.parametrize("family", ["dit-digits", "vit-digits"])
def test_the_commands_of_images(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    session = str(tmp_path / "s")
    made = ["--recipe", family, "--device", "cuda", "--steps", "4", "--set", "train.visit_steps=2"]
    trained = command("train", session, *made, "--memory-budget", "3GiB")
    assert trained["status"] == "complete"
    command("evaluate", session, "--device", "cuda")
    if family == "dit-digits":
        command("generate", session, "--to", str(tmp_path / "grid.png"), "--steps", "4", "--device", "cuda")


@pytest.mark.parametrize("name", ["tied", "lora dropout", "bf16"])
def test_doctor_finds_streamed_gradients_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those of plain autograd on the GPU."""
    cut_small(monkeypatch.setattr)
    spec, external = test_doctor.LANGUAGE[name]
    session = language_models.new_session(tmp_path / "s", spec, external)
    (tmp_path / "scratch").mkdir()
    found = examine(session, language_models.data_of(spec), "cuda", tmp_path / "scratch", 2)
    assert found.good, found
