"""The parity check: passes what is equal, finds what is not, keeps to the budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from devices.meter import resident_bytes_fast
from edgetrain.errors import BudgetBroken, ParityFailed, SessionLocked
from edgetrain.session import Session
from edgetrain.stages import groups
from edgetrain.store.slot import read_header
from exporters import onnx, parity
from exporters.compare import difference
from tests.exporters.common import export, make_session, run_python, small_spec

BUDGET = 350 << 20


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("session") / "s", small_spec())


CHECK = f"""
import json, sys
from exporters import parity
from pathlib import Path
print(json.dumps(parity.check(Path(sys.argv[1]), Path(sys.argv[2]), {BUDGET})))
assert "torch" not in sys.modules and "onnxruntime" not in sys.modules
"""


@pytest.mark.parametrize("single_file", [False, True])
def test_equal_outputs_pass_within_the_budget(session: Session, tmp_path: Path, single_file: bool) -> None:
    folder = export(session, tmp_path / "e", single_file)
    rows = json.loads(run_python(CHECK, str(session.path), str(folder)))
    outputs = {("model.onnx", name) for name in ("logits", "sigma_max_logits")}
    if not single_file:
        outputs = {(f"block0{block}.onnx", name) for block in (0, 1) for name in ("logits", "denoised")}
    assert {(row["file"], row["output"]) for row in rows} == outputs
    assert all(row["passed"] and row["batch_sizes"] == [2, 5] and row["max_abs"] < 1e-5 for row in rows)
    report = json.loads((folder / "parity.json").read_text())
    assert report["outputs"] == rows
    assert report["digest"] == session.store.digest()
    assert max(report["peak_bytes"].values()) < BUDGET
    assert not any(session.scratch.glob("parity.*"))


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
        parity.check(session.path, staged.folder, None)
        staged.publish()
    assert not to.exists()
    assert not any(tmp_path.iterdir())


def test_too_small_a_budget_is_named(session: Session, tmp_path: Path) -> None:
    folder = export(session, tmp_path / "e")
    with pytest.raises(BudgetBroken, match="the budget leaves for it"):
        parity.check(session.path, folder, resident_bytes_fast()[0] + (100 << 20))


def test_a_session_trained_on_is_another_model(tmp_path: Path) -> None:
    session = make_session(tmp_path / "s", small_spec())
    folder = export(session, tmp_path / "e")
    stage = groups(session.spec)["block00"][0]
    layout = stage.layout(session.shapes)
    with session.store.lock(["block00"]):
        transaction = session.store.transaction("block00")
        for role in layout.roles:
            transaction.write(stage.name, role.name, memoryview(bytes(layout.section_bytes(role.name))))
        transaction.commit(session.store.manifest("block00").state)
    with pytest.raises(SessionLocked, match="trained on since"):
        parity.check(session.path, folder, None)


def test_difference() -> None:
    reference = np.array([[1.0, -2.0, 1e-6, 0.0]], np.float32)
    row = difference(reference + np.float32([[0, 1e-4, 5e-6, 0]]), reference)
    assert row["passed"]
    assert row["max_abs"] == pytest.approx(1e-4, rel=1e-2)
    assert row["max_rel"] == pytest.approx(5e-5, rel=1e-2)
    assert not difference(reference + np.float32([[0, 0, 2e-5, 0]]), reference)["passed"]
    assert difference(reference * np.float32(np.nan), reference) == {"max_abs": None, "max_rel": None, "passed": False}
    assert not difference(reference[:, :2], reference)["passed"]
