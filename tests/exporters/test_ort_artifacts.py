"""What onnxruntime's training API takes: it trains with it, and its losses are those of our own updates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetrain.errors import BadInput, BudgetBroken, ParityFailed, UsageError
from edgetrain.schedule import Update
from edgetrain.session import Session
from edgetrain.training_data import block_draws, training_batches
from exporters import parity
from exporters.manifest import Manifest, TrainingManifest, artifact_files, read
from exporters.onnx import stage_artifacts
from exporters.ort_training import BlockMath, adamw, inputs_of_loss
from exporters.reference import compute
from tests.exporters.common import make_session, run_python
from tests.exporters.test_ort_training import SPECS, dataset_of, new_session, spec_of
from tests.test_dit import run
from tests.text_families import VOCABULARY

_STEPS, _LR = 20, 3e-4

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
folder, draws, block = Path(sys.argv[1]), np.load(sys.argv[2]), f"block{int(sys.argv[4]):02d}"
state = CheckpointState.load_checkpoint(str(folder / f"{block}.checkpoint"))
module = Module(str(folder / f"{block}.training_model.onnx"), state, str(folder / f"{block}.eval_model.onnx"))
optimizer = Optimizer(str(folder / f"{block}.optimizer_model.onnx"), module)
optimizer.set_learning_rate(float(sys.argv[3]))
names, losses = module.input_names(), []
for step in range(len(draws[names[0]])):
    module.train()
    losses.append(float(module(*(draws[name][step] for name in names))))
    optimizer.step()
    module.lazy_reset_grad()
assert "torch" not in sys.modules
print(json.dumps(losses))
"""


@pytest.mark.parametrize("name", ["calibrated", "dit", "masked", "ar", "recurrent"])
def test_the_api_trains_with_it(name: str, tmp_path: Path) -> None:
    spec = replace(SPECS[name], optimizer=replace(SPECS[name].optimizer, weight_decay=0.0))
    session, block = new_session(tmp_path / "s", spec), spec.num_blocks - 1
    with stage_artifacts(session, tmp_path / "x") as staged:
        staged.publish()
    manifest = read(tmp_path / "x")
    assert isinstance(manifest, TrainingManifest)
    assert set(manifest.files) == {name for block in range(spec.num_blocks) for name in artifact_files(block)}
    draws = block_draws(spec, training_batches(spec, dataset_of(spec, tmp_path)))
    math = BlockMath(spec, session.shapes, 1)
    math.bind(block)
    for member in math.members:
        session.store.read(member.stage.name, member.role, math.section("weight", member).data)
    codebooks = (math.view("", one, one.layout.tensors[0]) for one in math.members if one.stage.kind == "codebook")
    rows, given = next(codebooks, None), []
    unmoved = [math.run(draws(block, step, 0, spec.train.batch_size)) for step in range(_STEPS)]
    expected = []
    for step in range(_STEPS):
        draw = draws(block, step, 0, spec.train.batch_size)
        given.append(inputs_of_loss(spec, draw, rows))
        math.gradient.fill(0)
        expected.append(math.run(draw))
        for member in math.members:
            for tensor in member.layout.tensors if member.stage.trained else ():
                views = (math.view(n, member, tensor).reshape(-1) for n in ("weight", "gradient", "m", "v"))
                adamw(spec.optimizer, Update(_LR, step + 1, False), *views)
    np.savez(tmp_path / "draws.npz", **{name: np.stack([one[name] for one in given]) for name in given[0]})
    arguments = [str(tmp_path / "x"), str(tmp_path / "draws.npz"), str(_LR), str(block)]
    losses = json.loads(run_python(_API, *arguments).splitlines()[-1])
    np.testing.assert_allclose(losses, expected, rtol=0, atol=5e-5)
    assert np.abs(np.subtract(losses, unmoved)).max() > 0.02, "or training changed nothing"


@pytest.mark.parametrize("name", ["dit, paper", "masked, shared", "ar", "recurrent, paper"])
def test_every_family_is_compared(name: str, tmp_path: Path) -> None:
    session = make_session(tmp_path / "s", SPECS[name])
    with stage_artifacts(session, tmp_path / "x") as staged, (tmp_path / "outputs").open("w+b") as file:
        rows = parity.check(session.path, staged.folder, compute(session, False, file.fileno(), None), None)
    assert [row["output"] for row in rows] == ["loss"] * session.spec.num_blocks
    assert all(row["max_rel"] < 1e-5 for row in rows)


def test_what_examples_are_made_of_is_told(tmp_path: Path) -> None:
    """For programs that have no edgetrain."""
    told = {}
    for name in ("dit", "masked", "ar"):
        session = make_session(tmp_path / name / "s", SPECS[name])
        with stage_artifacts(session, tmp_path / name / "x") as staged:
            staged.publish()
        told[name] = json.loads((tmp_path / name / "x" / "manifest.json").read_text())["draws"]
        drawn = block_draws(session.spec, training_batches(session.spec, dataset_of(session.spec, tmp_path)))
        for block in range(session.spec.num_blocks):
            level = "t" if name == "masked" else "sigma"
            low, high = told[name][level][block]
            levels = np.concatenate([drawn(block, step, 0, 8)[level] for step in range(20)])
            assert low * 0.999 <= levels.min() < levels.max() <= high * 1.001
            assert levels.max() - levels.min() > 0.5 * (high - low) * (level == "t")
    assert (told["ar"]["codebook"], told["masked"]["mask"]) == ("codebook.rows", VOCABULARY)
    assert told["dit"]["image_shape"] == [1, 8, 8]


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
    session = new_session(tmp_path / "s", spec_of({"diffusion_blocks.auxiliary": 0.5}))
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
