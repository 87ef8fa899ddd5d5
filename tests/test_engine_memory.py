"""Where memory is short: it recomputes, then halves the micro-batch, for good; mostly in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import devices
from edgetrain.blockwise import BlockTrainer
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Choice
from edgetrain.session import Session
from tests.block_sessions import batches_of, new_session, small, state, train_on

pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_sizes_run_where_code_takes_memory(digits, tmp_path, monkeypatch):
    spec = small(train__micro_batch=3)
    session = new_session(tmp_path / "s", spec)
    seen = set()
    real = BlockTrainer._to_device

    def recorded(self: BlockTrainer, draw: Any) -> Any:
        seen.add(len(next(iter(draw.values()))))
        return real(self, draw)

    monkeypatch.setattr(BlockTrainer, "_to_device", recorded)
    with session.store.lock(["block00"]):
        device = devices.open_device("cpu", session.scratch)
        objective = diffusion_blocks(spec, batches_of(spec, digits))
        trainer = BlockTrainer(session, device, Choice(3, "recompute", True), objective)
        trainer.warm_up(session.progress(0))
        assert seen == {1}
        trainer.run_all_sizes(session.progress(0))
    assert seen == {1, 2, 3}
    assert not trainer.resident.flat_gradient().any()
    assert trainer.retries == 0


def test_a_plan_that_is_too_low_is_no_harm_where_code_takes_memory(digits, tmp_path):
    """Running all sizes first must not take what the budget has not: then nothing could be given up any more."""
    code = _TOO_LOW.format(root=Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout.splitlines()[-1])
    assert value["status"] == "complete"
    assert value["retries"] > 0
    assert value["peak_bytes"] <= value["budget_bytes"]


_TOO_LOW = """
import sys
sys.path.insert(0, "{root}")
from devices.limits import prepare_process
prepare_process(1)
import json
from pathlib import Path
import torch
from devices.memory import HostMemory
from devices.meter import usage
from edgetrain.data import open_dataset
from tests import block_sessions as t
torch.set_num_threads(1)
HostMemory.counts_code = True
folder = Path(sys.argv[1])
digits = open_dataset("digits", "train", folder)
spec = t.small(model__width=64, model__patch=1, train__batch_size=192, train__micro_batch=192, train__steps=1)
session = t.new_session(folder / "s", spec)
budget = usage().resident_bytes + (110 << 20)
plan = t.Plan(budget, 0, 0, {{}}, t.Choice(192, "keep", True), 0.0, 0, 0, 0, 1)
print(json.dumps(t.train(session, spec, plan, digits, "cpu", visits=None, blocks=[0, 1], on_report=lambda r: None,
                         stop=lambda: False)))
"""

_PRELUDE = """
import json, sys
from devices import limits
limits.prepare_process(1)
import torch
torch.set_num_threads(1)
import tests.block_sessions as t
from edgetrain.data import open_dataset
from pathlib import Path
folder = Path(sys.argv[1])
digits = open_dataset("digits", "train", folder)
"""


def in_a_process(code: str, folder: Path, *arguments: str, exit_code: int = 0) -> Any:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + code, str(folder), *arguments],
        capture_output=True, text=True, check=False, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == exit_code, done.stderr
    return json.loads(done.stdout or "null")


_SHORT_OF_MEMORY = """
spec = t.small(model__width=64, model__depth=6, diffusion_blocks__num_blocks=1, train__batch_size=192,
               train__micro_batch=192, train__steps=2)

def run(name, kind, room_bytes=None):
    from devices import meter
    session = t.new_session(folder / name, spec)
    device = t.devices.open_device("cpu", session.scratch)
    with session.store.lock(["block00"]):
        objective = t.diffusion_blocks(spec, t.batches_of(spec, digits))
        trainer = t.BlockTrainer(session, device, t.Choice(192, kind, True), objective)
        engine = t.Engine(session, trainer, 192)
        engine.warm_up()
        if room_bytes is not None:
            limits.set_data_limit(meter.usage().data_bytes + room_bytes)
        steps = []
        try:
            engine.visit(0, 2, steps.append)
            session.store.flush()
        finally:
            limits.lift_data_limit()
    session = t.Session.open(folder / name)
    return {"digest": session.store.verify().digest, "retries": trainer.retries, "steps": len(steps),
            "kind": type(trainer.activations).__name__, "micro_batches": session.progress(0).micro_batches,
            "losses": [step.loss for step in steps]}

"""


def test_short_of_memory_it_recomputes_with_the_same_result(tmp_path):
    code = 'print(json.dumps([run("free", "keep"), run("tight", "keep", 72 << 20)]))'
    free, tight = in_a_process(_SHORT_OF_MEMORY + code, tmp_path)
    assert (free["kind"], free["retries"]) == ("Keep", 0)
    assert (tight["kind"], tight["retries"]) == ("Recompute", 1), "the limit has to be hit"
    assert tight["micro_batches"] == [[0, 192]]
    assert tight["digest"] == free["digest"]
    assert tight["steps"] == 2


def test_still_short_of_memory_it_halves_the_micro_batch_durably(tmp_path):
    code = 'print(json.dumps([run("free", "keep"), run("tight", "keep", 12 << 20)]))'
    free, tight = in_a_process(_SHORT_OF_MEMORY + code, tmp_path)
    sizes = [size for _, size in tight["micro_batches"]]
    assert sizes[:2] == [192, 96]
    assert sizes == [-(-192 // 2**i) for i in range(len(sizes))]
    assert all(step == 0 for step, _ in tight["micro_batches"])
    assert tight["steps"] == 2
    assert tight["losses"] == pytest.approx(free["losses"], rel=1e-4), "another rounding, the same training"


_SHORT_IN_STEP_TWO = """
import os, signal
from devices import meter

kill_after = int(sys.argv[2])
path = folder / sys.argv[3]
spec = t.small(model__width=64, model__depth=2, diffusion_blocks__num_blocks=1, train__batch_size=192,
               train__micro_batch=192, train__steps=6, train__visit_steps=4)
session = t.new_session(path, spec)

def on_report(report):
    if report.step == 2:
        limits.set_data_limit(meter.usage().data_bytes + (8 << 20))
    if report.step == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

def once_halved():  # asked before each step
    if len(session.progress(0).micro_batches) > 1:
        limits.lift_data_limit()
    return False

plan = t.Plan(t.PLENTY_BYTES, 0, 0, {}, t.Choice(192, "recompute", True), 0.0, 0, 0, 0, 1)
t.train(session, spec, plan, digits, "cpu", visits=None, blocks=[0], on_report=on_report, stop=once_halved)
"""


@pytest.mark.parametrize("kill_after", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_micro_batch_halved_later_on_outlives_a_kill(kill_after, digits, tmp_path):
    """Killed before the next commit after it, or in the next visit; the rest is as if it had not been killed."""
    in_a_process(_SHORT_IN_STEP_TWO, tmp_path, "0", "whole")
    whole = Session.open(tmp_path / "whole")
    assert whole.progress(0).micro_batches == ((0, 192), (2, 96))
    in_a_process(_SHORT_IN_STEP_TWO, tmp_path, str(kill_after), "killed", exit_code=-signal.SIGKILL)
    killed = Session.open(tmp_path / "killed")
    assert killed.progress(0).step == (2 if kill_after == 3 else 4)
    assert killed.progress(0).micro_batches == ((0, 192), (2, 96)), "durable before it took effect"
    resumed = train_on(tmp_path / "killed", digits, choice=Choice(192, "keep", True))
    assert (resumed.summary["status"], resumed.summary["micro_batch"]) == ("complete", 96)
    assert resumed.session.progress(0) == whole.progress(0)
    assert resumed.digest == whole.store.digest()
    assert state(resumed.session) == state(whole)


def test_training_imports_no_compiler_stack(tmp_path):
    """sympy and torch._dynamo would cost some 70 MiB of the budget."""
    code = """
for name, kind in (("k", "keep"), ("r", "recompute"), ("o", "offload")):
    t.complete(folder / name, t.paper() if kind == "recompute" else t.small(), digits, choice=t.Choice(8, kind, False))
print(json.dumps(sorted(m for m in sys.modules if m in ("sympy", "torch._dynamo", "torch._inductor", "onnx"))))
"""
    assert in_a_process(code, tmp_path) == []
