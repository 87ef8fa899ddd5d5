"""What onnxruntime's training API takes: it trains with it, and its losses are those of our own updates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetrain.data import open_dataset
from edgetrain.errors import BadInput, BudgetBroken, ParityFailed, UsageError
from edgetrain.schedule import Update
from edgetrain.session import Session
from edgetrain.training_data import draw_labels, training_batches
from exporters import parity
from exporters.manifest import Manifest, TrainingManifest, artifact_files, read
from exporters.onnx import stage_artifacts
from exporters.ort_training import BlockMath, adamw
from exporters.reference import compute
from tests.exporters.common import run_python
from tests.exporters.test_ort_training import new_session, spec_of
from tests.test_dit import run

_STEPS, _LR = 20, 2e-3

_API = """
import json, sys, types
import numpy as np
from pathlib import Path
import importlib.util
found = importlib.util.find_spec("onnxruntime").submodule_search_locations[0]
package = types.ModuleType("onnxruntime.training")
package.__path__ = [found + "/training"]
sys.modules.update({"onnxruntime.training": package, "onnxruntime.training.ortmodule": None})
from onnxruntime.training.api import CheckpointState, Module, Optimizer
folder, draws = Path(sys.argv[1]), np.load(sys.argv[2])
state = CheckpointState.load_checkpoint(str(folder / "block01.checkpoint"))
module = Module(str(folder / "block01.training_model.onnx"), state, str(folder / "block01.eval_model.onnx"))
optimizer = Optimizer(str(folder / "block01.optimizer_model.onnx"), module)
optimizer.set_learning_rate(float(sys.argv[3]))
names, losses = module.input_names(), []
for step in range(len(draws["labels"])):
    module.train()
    losses.append(float(module(*(draws[name][step] for name in names))))
    optimizer.step()
    module.lazy_reset_grad()
assert "torch" not in sys.modules
print(json.dumps(losses))
"""


def test_the_api_trains_with_it(tmp_path: Path) -> None:
    spec = spec_of({"optimizer.weight_decay": 0.0})
    session = new_session(tmp_path / "s", spec)
    with stage_artifacts(session, tmp_path / "x") as staged:
        staged.publish()
    manifest = read(tmp_path / "x")
    assert isinstance(manifest, TrainingManifest)
    assert set(manifest.files) == {name for block in range(2) for name in artifact_files(block)}
    batches = training_batches(spec, open_dataset("digits", "train", tmp_path))
    math = BlockMath(spec, session.shapes, 1)
    math.bind(1)
    for member in math.members:
        session.store.read(member.stage.name, member.role, math.section("weight", member).data)
    rows = next(math.view("", one, one.layout.tensors[0]) for one in math.members if one.stage.kind == "codebook")
    draws: dict[str, list[np.ndarray]] = {name: [] for name in ("images", "z", "sigma", "labels")}
    expected = []
    for step in range(_STEPS):
        draw = draw_labels(spec, batches, 1, step, 0, 16)
        z = rows[draw["labels"]] + draw["sigma"][:, None] * draw["eps"]
        for name, array in (draw | {"z": z}).items():  # type: ignore[operator]
            if name in draws:
                draws[name].append(array)
        math.gradient.fill(0)
        expected.append(math.run(draw))
        for member in math.members:
            for tensor in member.layout.tensors if member.stage.trained else ():
                views = (math.view(n, member, tensor).reshape(-1) for n in ("weight", "gradient", "m", "v"))
                adamw(spec.optimizer, Update(_LR, step + 1, False), *views)
    np.savez(tmp_path / "draws.npz", **{name: np.stack(arrays) for name, arrays in draws.items()})
    losses = json.loads(run_python(_API, str(tmp_path / "x"), str(tmp_path / "draws.npz"), str(_LR)).splitlines()[-1])
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_the_command(tmp_path: Path) -> None:
    """Compared with torch's loss; nothing of torch where it is made; another export may take its place."""
    session = new_session(tmp_path / "s", spec_of()).path
    to = tmp_path / "x"
    for _ in range(2):
        made = run("export", session, "--to", to, "--format", "ort-training", "--memory-budget", "400MiB")
        assert [row["output"] for row in made["parity"]] == ["loss", "loss"]
        assert all(row["passed"] for row in made["parity"])
        assert made["emit_peak_bytes"] < 120 << 20, "torch was imported"
    assert all(row["batch_sizes"] == [2, 5] for row in made["parity"])
    wrong = tmp_path / "wrong"
    with stage_artifacts(Session.open(session), wrong) as staged:
        checkpoints = [staged.folder / artifact_files(block)[3] for block in range(2)]
        checkpoints[0].write_bytes(checkpoints[1].read_bytes())  # of another block
        with pytest.raises(ParityFailed, match="loss"), (tmp_path / "outputs").open("w+b") as file:
            parity.check(session, staged.folder, compute(Session.open(session), False, file.fileno(), None), None)
    model = onnx.load(to / "block00.optimizer_model.onnx")
    assert model.ir_version == 10
    modes = [one.i for node in model.graph.node for one in node.attribute if one.name == "adam_mode"]
    assert modes == [0]
    with pytest.raises(BadInput, match="training API"):
        Manifest.read(to)
    said = run("predict", to, "--data", "digits", exit_code=7)
    assert "training API" in said["message"]
    said = run("export", session, "--to", to, "--format", "ort-training", "--single-file", exit_code=2)
    assert "--single-file is no option" in said["message"]


def test_only_what_onnxruntime_trains(tmp_path: Path) -> None:
    session = new_session(tmp_path / "s", spec_of({"diffusion_blocks.auxiliary": 0.5}), by_torch=True)
    with pytest.raises(UsageError, match="auxiliary"), stage_artifacts(session, tmp_path / "x"):
        pass
    assert not (tmp_path / "x").exists()


def test_what_does_not_fit_the_budget_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_of({"model.width": 256, "diffusion_blocks.num_blocks": 1})
    session = new_session(tmp_path / "s", spec)
    with (
        pytest.raises(BudgetBroken, match="generating what trains"),
        stage_artifacts(session, tmp_path / "x", 90 << 20),
    ):
        pass
    assert not list(tmp_path.glob("*x*"))
