"""The parity check: passes what is equal, finds what is not, keeps to the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from devices.meter import TreeMeter, resident_bytes_fast
from edgetrain.errors import BudgetBroken, ParityFailed, SessionLocked
from edgetrain.session import Session
from edgetrain.stages import groups
from edgetrain.store.slot import read_header
from exporters import onnx, parity, reference
from exporters.compare import difference
from tests.exporters.common import ROOT, export, make_session, small_spec

BUDGET = 350 << 20


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("session") / "s", small_spec())


def referenced(session: Session, folder: Path, single_file: bool = False) -> parity.Reference:
    """What torch computes, here in this process."""
    with (folder / "reference").open("w+b") as file:
        return reference.compute(session, single_file, os.dup(file.fileno()), None)


def command(session: Session, to: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``edgetrain export``, in processes of its own."""
    start = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", start, "export", str(session.path), "--to", str(to), *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("single_file", [False, True])
def test_equal_outputs_pass_within_the_budget(session: Session, tmp_path: Path, single_file: bool) -> None:
    folder = tmp_path / "e"
    done = command(session, folder, "--json", "--memory-budget", str(BUDGET), *["--single-file"] * single_file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["parity"]
    outputs = {("model.onnx", name) for name in ("logits", "sigma_max_logits")}
    if not single_file:
        outputs = {(f"block0{block}.onnx", name) for block in (0, 1) for name in ("logits", "denoised")}
    assert {(row["file"], row["output"]) for row in rows} == outputs
    assert all(row["passed"] and row["batch_sizes"] == [2, 5] and row["max_abs"] < 1e-5 for row in rows)
    report = json.loads((folder / "parity.json").read_text())
    assert report["outputs"] == rows
    assert report["digest"] == session.store.digest()
    assert max(report["peak_bytes"].values()) < BUDGET
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize(("name", "change"), [("block01.layer002.qkv.weight", 0.1), ("codebook.rows", np.nan)])
def test_one_changed_weight_fails_and_nothing_is_published(
    session: Session, tmp_path: Path, name: str, change: float
) -> None:
    to = tmp_path / "e"
    with pytest.raises(ParityFailed, match=r"of block0[01].onnx differs"), onnx.stage(session, to, False) as staged:
        path = staged.folder / "weights.safetensors"
        header = read_header(path)
        with path.open("r+b") as file:
            file.seek(header.data_start + header.tensors[name].begin)
            value = np.frombuffer(file.read(4), np.float32)[0] + np.float32(change)
            file.seek(-4, 1)
            file.write(value.tobytes())
        parity.check(session.path, staged.folder, referenced(session, tmp_path), None)
        staged.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_too_small_a_budget_is_named(session: Session, tmp_path: Path) -> None:
    """No folder is left that was made for it."""
    done = command(session, tmp_path / "new" / "deep" / "e", "--memory-budget", "100MiB")
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (8, "", [])
    assert "the 100.0 MiB that the budget leaves for it" in done.stderr
    folder = export(session, tmp_path / "e")
    with pytest.raises(BudgetBroken, match="the budget leaves for it"):
        parity.check(session.path, folder, referenced(session, tmp_path), resident_bytes_fast()[0] + (20 << 20))


def test_no_process_waits_for_torch(session: Session, tmp_path: Path) -> None:
    """The tree takes what torch alone takes: what the smallest training has is enough."""
    start = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"
    arguments = ["export", str(session.path), "--to", str(tmp_path / "e"), "--memory-budget", str(BUDGET)]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *arguments], stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    with TreeMeter(process.pid, poll_s=0.003) as meter:
        assert process.wait(timeout=120) == 0
    alone = json.loads((tmp_path / "e" / "parity.json").read_text())["peak_bytes"]["reference"]
    assert max(meter.peak_bytes, *meter.high_water_bytes.values()) <= alone + (1 << 20)


def test_a_session_trained_on_is_another_model(tmp_path: Path) -> None:
    session = make_session(tmp_path / "s", small_spec())
    before = referenced(session, tmp_path)
    stage = groups(session.spec)["block00"][0]
    layout = stage.layout(session.shapes)
    with session.store.lock(["block00"]):
        transaction = session.store.transaction("block00")
        for role in layout.roles:
            transaction.write(stage.name, role.name, memoryview(bytes(layout.section_bytes(role.name))))
        transaction.commit(session.store.manifest("block00").state)
    folder = export(Session.open(session.path), tmp_path / "e")
    with pytest.raises(SessionLocked, match="trained on while"):
        parity.check(session.path, folder, before, None)


def test_difference() -> None:
    reference = np.array([[1.0, -2.0, 1e-6, 0.0]], np.float32)
    row = difference(reference + np.float32([[0, 1e-4, 5e-6, 0]]), reference)
    assert row["passed"]
    assert row["max_abs"] == pytest.approx(1e-4, rel=1e-2)
    assert row["max_rel"] == pytest.approx(5e-5, rel=1e-2)
    assert not difference(reference + np.float32([[0, 0, 2e-5, 0]]), reference)["passed"]
    assert difference(reference * np.float32(np.nan), reference) == {"max_abs": None, "max_rel": None, "passed": False}
    assert not difference(reference[:, :2], reference)["passed"]
