"""The engine on small real sessions: whatever may differ from run to run changes no bit of the result."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import devices
from edgetrain import engine as engine_module
from edgetrain.activations import Keep
from edgetrain.blockwise import BlockTrainer, build_modules
from edgetrain.data import Dataset, open_dataset, to_float
from edgetrain.engine import Engine
from edgetrain.errors import SessionCorrupt, SessionLocked, TrainingDiverged, UsageError
from edgetrain.models import build_family
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Choice, Plan, Probe
from edgetrain.recipe import resolve
from edgetrain.sampling import Sampler, accuracies, readouts
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import Stage, group_of_block, groups, stages_of_block
from edgetrain.store import Store
from edgetrain.training import create, next_visit, train

KEEP = Choice(8, "keep", True)
PLENTY_BYTES = 1 << 40

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes: Any) -> Spec:
    base = {
        "model.width": 16, "model.depth": 4, "model.heads": 2, "model.patch": 2, "model.image_shape": [1, 8, 8],
        "model.num_classes": 10, "diffusion_blocks.num_blocks": 2, "data.shift": 1, "train.batch_size": 8,
        "train.micro_batch": 8, "train.steps": 4, "train.visit_steps": 2, "optimizer.lr": 1e-2,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


def paper(**changes: Any) -> Spec:
    return small(diffusion_blocks__preset="paper", **changes)


def new_session(path: Path, spec: Spec) -> Session:
    """As ``edgetrain train`` makes it, with the shapes taken from modules instead of from a probe."""
    block = build_modules(spec, build_family(spec), 0)
    kinds = {"codebook": block.codebook, "stem": block.stem, "layer": block.layers[0], "head": block.head}
    shapes = {k: {n: list(p.shape) for n, p in m.named_parameters()} for k, m in kinds.items() if m is not None}
    return create(path, spec, Probe(shapes, None, 0, 0, {}, {}, None))


@dataclass
class Done:
    summary: dict[str, Any]
    session: Session
    visited: list[tuple[int, int]]

    @property
    def digest(self) -> str:
        return self.summary["digest"]


def train_on(
    path: Path,
    dataset: Dataset,
    *,
    choice: Choice = KEEP,
    device: str = "cpu",
    blocks: Sequence[int] | None = None,
    visits: int | None = None,
    stop_after: int | None = None,
) -> Done:
    """Goes on with the session in ``path``, opened anew; ``stop_after`` optimizer steps it is interrupted."""
    session = Session.open(path)
    plan = Plan(PLENTY_BYTES, 0, 0, {}, choice, 0.0, 0, 0, 0, 1)
    visited: list[tuple[int, int]] = []
    summary = train(
        session, session.spec, plan, dataset, device, visits=visits,
        blocks=list(range(session.spec.num_blocks)) if blocks is None else blocks,
        on_report=lambda report: visited.append((report.block, report.step)),
        stop=lambda: stop_after is not None and len(visited) >= stop_after,
    )  # fmt: skip
    again = Session.open(path)
    assert again.store.verify().digest == summary["digest"] == again.store.digest()
    return Done(summary, again, visited)


def complete(path: Path, spec: Spec, dataset: Dataset, **how: Any) -> Done:
    new_session(path, spec)
    return train_on(path, dataset, **how)


def tensors(session: Session, stage: Stage, role: str) -> dict[str, np.ndarray]:
    layout = stage.layout(session.shapes)
    data = bytearray(layout.section_bytes(role))
    session.store.read(stage.name, role, memoryview(data))
    return {
        t.name: np.frombuffer(data, np.float32, t.nbytes // 4, layout.offset(role, t.name)).reshape(t.shape).copy()
        for t in layout.tensors
    }


def state(session: Session) -> dict[str, bytes]:
    """Every current section of a session, moments included."""
    return {
        f"{stage.name} {role} {name}": array.tobytes()
        for members in groups(session.spec).values()
        for stage in members
        for role in ("weight", "m", "v")
        for name, array in tensors(session, stage, role).items()
    }


def slot_bytes(path: Path, prefix: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "stages").glob(f"{prefix}*"))}


SPECS = {
    "calibrated": small(train__steps=3),
    "paper": paper(train__steps=3),
    "uneven": small(model__depth=5, diffusion_blocks__num_blocks=3, train__steps=2),
    "auxiliary": small(diffusion_blocks__auxiliary=0.5),
    "frozen stem": small(diffusion_blocks__stem="frozen"),
    "shared stem": small(diffusion_blocks__stem="shared"),
    "live codebook": small(diffusion_blocks__codebook="shared"),
}
FAST = ("calibrated", "paper", "uneven")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in SPECS],
)
def reference(request, tmp_path_factory, digits) -> tuple[Spec, dict[str, bytes], str]:
    """A spec, and what training it plainly and without a stop ends with."""
    spec = SPECS[request.param]
    done = complete(tmp_path_factory.mktemp("reference") / "s", spec, digits)
    assert done.summary["status"] == "complete"
    return spec, state(done.session), done.digest


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_activations_and_device_change_no_bit(reference, activations, device, digits, tmp_path):
    spec, expected, digest = reference
    done = complete(tmp_path / "s", spec, digits, choice=Choice(8, activations, True), device=device)
    assert done.summary["activations"] == activations
    assert done.summary["retries"] == 0
    assert (done.summary["offloaded_bytes"] > 0) == (activations == "offload")
    assert state(done.session) == expected, "moments are sums of gradients: they would show any difference"
    assert done.digest == digest


@pytest.mark.parametrize("activations", ["keep", "offload"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_streamed_moments_change_no_bit(reference, device, activations, digits, tmp_path):
    spec, expected, digest = reference
    done = complete(tmp_path / "s", spec, digits, choice=Choice(8, activations, False), device=device)
    assert state(done.session) == expected
    assert done.digest == digest


def test_interrupted_after_any_step_and_resumed(reference, digits, tmp_path):
    spec, expected, digest = reference
    path = tmp_path / "s"
    total = spec.train.steps * spec.num_blocks
    for stop_after in range(1, total):
        shutil.rmtree(path, ignore_errors=True)
        first = complete(path, spec, digits, stop_after=stop_after, choice=Choice(8, "keep", stop_after % 2 == 0))
        assert first.summary["status"] == "interrupted"
        assert len(first.visited) == stop_after
        second = train_on(path, digits, choice=Choice(8, "recompute", stop_after % 3 == 0))
        assert len(first.visited) + len(second.visited) == total, "no step is done twice"
        assert second.summary["status"] == "complete"
        assert state(second.session) == expected, f"interrupted after {stop_after} steps"
        assert second.digest == digest


def test_stopped_after_every_single_step(reference, digits, tmp_path):
    spec, _, digest = reference
    path = tmp_path / "s"
    new_session(path, spec)
    for _ in range(spec.train.steps * spec.num_blocks):
        done = train_on(path, digits, stop_after=1, choice=Choice(8, "keep", False))
    assert done.summary["status"] == "complete"
    assert done.digest == digest


@pytest.mark.parametrize("moments_resident", [True, False])
def test_commits_in_the_midst_of_a_visit_change_no_bit(reference, moments_resident, digits, tmp_path, monkeypatch):
    spec, expected, _ = reference
    monkeypatch.setattr(engine_module, "_COMMIT_EVERY_S", -1.0)
    done = complete(tmp_path / "s", spec, digits, choice=Choice(8, "keep", moments_resident))
    assert state(done.session) == expected


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("visit_steps", [1, 3, 7])
def test_with_private_stems_visits_change_no_bit(visit_steps, order, digits, tmp_path):
    expected = complete(tmp_path / "plain", small(train__steps=7), digits)
    spec = small(train__steps=7, train__visit_steps=visit_steps, train__order=order)
    done = complete(tmp_path / "s", spec, digits)
    assert done.visited != expected.visited
    assert state(done.session) == state(expected.session)


def test_blocks_one_at_a_time_change_no_bit(digits, tmp_path):
    expected = complete(tmp_path / "plain", small(), digits)
    new_session(tmp_path / "s", small())
    first = train_on(tmp_path / "s", digits, blocks=[1])
    assert first.summary["status"] == "partial"
    assert {block for block, _ in first.visited} == {1}
    train_on(tmp_path / "s", digits, blocks=[0], visits=1)
    done = train_on(tmp_path / "s", digits, blocks=[0])
    assert done.summary["status"] == "complete"
    assert done.digest == expected.digest


def test_two_copies_put_together_are_one_session(digits, tmp_path):
    expected = complete(tmp_path / "plain", small(), digits)
    one, other = tmp_path / "one", tmp_path / "other"
    new_session(one, small())
    shutil.copytree(one, other)
    train_on(one, digits, blocks=[0])
    train_on(other, digits, blocks=[1])
    group = group_of_block(small(), 1)
    shutil.copytree(other / "groups" / group, one / "groups" / group, dirs_exist_ok=True)
    for file in (other / "stages").glob("block01.*"):
        shutil.copy(file, one / "stages")
    together = Session.open(one)
    assert together.store.verify().digest == expected.digest
    assert state(together) == state(expected.session)
    assert train_on(one, digits).summary["status"] == "complete"


def test_the_seed_and_the_order_of_shared_visits_do_change_the_result(digits, tmp_path):
    """The control: the digest notices what it should."""
    plain = complete(tmp_path / "plain", paper(), digits).digest
    assert complete(tmp_path / "seed", paper(train__seed=1), digits).digest != plain
    assert complete(tmp_path / "order", paper(train__visit_steps=1), digits).digest != plain
    assert complete(tmp_path / "again", paper(), digits).digest == plain


# ---------------------------------------------------------------------------------------- what a step changes


def test_only_the_active_block_changes(digits, tmp_path):
    path = tmp_path / "s"
    new_session(path, small())
    before = {prefix: slot_bytes(path, prefix) for prefix in ("block00", "block01", "codebook")}
    manifest = path / "groups" / "block01" / "manifest.json"
    manifest_before = manifest.read_bytes()
    train_on(path, digits, blocks=[0])
    after = {prefix: slot_bytes(path, prefix) for prefix in before}
    assert after["block01"] == before["block01"], "weights and optimizer state, both slots"
    assert after["codebook"] == before["codebook"]
    assert manifest.read_bytes() == manifest_before
    assert all(after["block00"][name] != data for name, data in before["block00"].items())


@pytest.mark.parametrize("moments_resident", [True, False])
def test_with_shared_stages_the_other_blocks_layers_stay(moments_resident, digits, tmp_path):
    path = tmp_path / "s"
    session = new_session(path, paper())
    train_on(path, digits, visits=2, choice=Choice(8, "keep", moments_resident))  # one visit of each
    before = state(Session.open(path))
    done = train_on(path, digits, visits=1, choice=Choice(8, "keep", moments_resident))
    (active,) = {block for block, _ in done.visited}
    after = state(done.session)
    changed = {name.split()[0] for name in before if before[name] != after[name]}
    mine = {stage.name for stage in stages_of_block(session.spec, active)}
    assert changed == mine
    assert any(not name.startswith("block") for name in mine), "among them shared stages"


def plain_learning_rate(spec: Spec, step: int) -> float:
    total, peak = spec.train.steps, spec.optimizer.lr
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)


@pytest.mark.parametrize("preset", ["calibrated", "paper"])
def test_a_block_trains_as_in_a_plain_torch_loop(preset, digits, tmp_path):
    spec = small(
        diffusion_blocks__preset=preset, diffusion_blocks__stem="private", diffusion_blocks__head="private",
        diffusion_blocks__codebook="frozen", train__steps=6, optimizer__weight_decay=0.3, optimizer__lr=3e-3,
    )  # fmt: skip
    session = new_session(tmp_path / "s", spec)
    block = build_modules(spec, build_family(spec), 1)
    modules = [block.codebook, block.stem, *block.layers, block.head]
    stages = stages_of_block(spec, 1)
    for stage, module in zip(stages, modules, strict=True):
        module.to_empty(device="cpu")
        for name, array in tensors(session, stage, "weight" if stage.trained else "frozen").items():
            parameter = module.get_parameter(name)
            parameter.data.copy_(torch.from_numpy(array))
            parameter.requires_grad_(stage.trained)
    named = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in named if n.endswith(".weight")], "weight_decay": 0.3},
        {"params": [p for n, p in named if not n.endswith(".weight")], "weight_decay": 0.0},
    ])  # fmt: skip
    batches = batches_of(spec, digits)
    objective = diffusion_blocks(spec, batches)
    norms = []
    for step in range(spec.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = plain_learning_rate(spec, step)
        drawn = {name: torch.from_numpy(array) for name, array in objective.draw(1, step, 0, 8).items()}
        optimizer.zero_grad()
        objective.loss(block, drawn, Keep()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
    assert max(norms) > 1, "or clipping is not tested"
    engine_steps = run_engine(session, batches, 1, spec.train.steps)
    assert [step.gradient_norm for step in engine_steps] == pytest.approx(norms, rel=1e-3)
    for stage, module in zip(stages, modules, strict=True):
        for name, found in tensors(session, stage, "weight" if stage.trained else "frozen").items():
            array, expected = found, module.get_parameter(name).detach().numpy()
            if name == "qkv.bias":  # softmax cancels a bias of the keys: its gradient is rounding, which Adam blows up
                array, expected = np.delete(array, np.s_[16:32]), np.delete(expected, np.s_[16:32])
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5, err_msg=f"{stage.name} {name}")


def test_a_short_training_learns_and_evaluates(digits, tmp_path):
    spec = small(
        model__width=32, train__steps=150, train__batch_size=32, train__micro_batch=32, train__visit_steps=25,
        data__shift=0, optimizer__lr=5e-3,
    )  # fmt: skip
    session = complete(tmp_path / "s", spec, digits, choice=Choice(32, "keep", True)).session
    test = open_dataset("digits", "test", tmp_path)
    found = accuracies(Sampler(session, devices.open_device("cpu"), 64), test, readouts(2, None, 2))
    assert min(found.values()) > 50, "ten classes"
    again = accuracies(Sampler(session, devices.open_device("emulated"), 64), test, readouts(2, None, 2))
    assert again == found


def test_micro_batches_add_up_to_the_batch(digits, tmp_path):
    """The first moment after one step is the gradient times 1 - beta1."""
    found = {}
    for micro_batch in (8, 4, 3, 1):
        path = tmp_path / str(micro_batch)
        spec = small(train__micro_batch=micro_batch, optimizer__clip=1e9)
        new_session(path, spec)
        session = train_on(path, digits, stop_after=1, choice=Choice(micro_batch, "keep", True)).session
        stages = [stage for stage in stages_of_block(spec, 1) if stage.trained]
        found[micro_batch] = [(n, a) for stage in stages for n, a in tensors(session, stage, "m").items()]
    assert max(abs(a).max() for _, a in found[8]) > 1e-3
    for micro_batch in (4, 3, 1):
        for (name, array), (_, expected) in zip(found[micro_batch], found[8], strict=True):
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6, err_msg=name)


# --------------------------------------------------------------------------------------------- what goes wrong


def batches_of(spec: Spec, dataset: Dataset, spoilt: Callable[[int], bool] = lambda step: False) -> Any:
    """Plain batches in the data's order; those of ``spoilt`` steps hold one infinite pixel."""

    def batches(block: int, step: int, first: int, count: int) -> tuple[Any, Any]:
        start = (step * spec.train.batch_size + first) % 1000
        images, labels = dataset.read(np.arange(start, start + count))
        images = to_float(images)
        if spoilt(step):
            images[-1, 0, 3, 3] = np.inf
        return images, labels

    return batches


def run_engine(session: Session, batches: Any, block: int, num_steps: int, choice: Choice = KEEP) -> list[Any]:
    """One visit."""
    steps: list[Any] = []
    with session.store.lock([group_of_block(session.spec, block)]):
        device = devices.open_device("cpu", session.scratch)
        trainer = BlockTrainer(session, device, choice, diffusion_blocks(session.spec, batches))
        engine = Engine(session, trainer, choice.micro_batch)
        engine.warm_up()
        engine.visit(block, num_steps, steps.append)
        session.store.flush()
    return steps


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
from tests import test_engine as t
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


@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("moments_resident", [True, False])
def test_a_step_with_an_infinite_pixel_is_skipped_and_recorded(moments_resident, micro_batch, digits, tmp_path):
    spec = small(train__steps=6, train__micro_batch=micro_batch)
    session = new_session(tmp_path / "s", spec)
    choice = Choice(micro_batch, "keep", moments_resident)
    before = run_engine(session, batches_of(spec, digits), 0, 2, choice)
    at_two = state(session)
    (skipped,) = run_engine(session, batches_of(spec, digits, lambda step: step == 2), 0, 1, choice)
    assert all(step.loss is not None for step in before)
    assert skipped.loss is None
    session = Session.open(tmp_path / "s")
    progress = session.progress(0)
    assert (progress.step, progress.skipped, progress.updates) == (3, (2,), 2)
    assert progress.loss == before[-1].loss
    assert state(session) == at_two, "weights and moments are as before"
    (after,) = run_engine(session, batches_of(spec, digits), 0, 1, choice)
    assert math.isfinite(after.loss)
    assert session.progress(0).updates == 3
    assert Session.open(tmp_path / "s").store.verify().digest == session.store.digest()


@pytest.mark.parametrize("moments_resident", [True, False])
def test_a_skipped_step_inside_a_visit(moments_resident, digits, tmp_path):
    """The same result as with the visit cut before and after it."""
    spec, choice = small(train__steps=6), Choice(8, "keep", moments_resident)
    spoilt = batches_of(spec, digits, lambda step: step == 2)
    whole = new_session(tmp_path / "whole", spec)
    steps = run_engine(whole, spoilt, 0, 5, choice)
    assert [step.loss is None for step in steps] == [False, False, True, False, False]
    parts = new_session(tmp_path / "parts", spec)
    run_engine(parts, spoilt, 0, 4)
    run_engine(parts, spoilt, 0, 1)
    assert state(whole) == state(parts)
    assert whole.progress(0) == parts.progress(0)


def test_a_lost_loss_raises_and_leaves_the_session_resumable(digits, tmp_path):
    spec = small(train__steps=30)
    session = new_session(tmp_path / "s", spec)
    run_engine(session, batches_of(spec, digits), 0, 3)
    committed = state(session)
    with pytest.raises(TrainingDiverged, match="block 0 diverged") as caught:
        run_engine(session, batches_of(spec, digits, lambda step: step >= 5), 0, 20)
    assert caught.value.exit_code == 9
    assert "0.01" in str(caught.value), "names the learning rate"
    session = Session.open(tmp_path / "s")
    assert state(session) == committed
    assert session.progress(0).step == 3
    run_engine(session, batches_of(spec, digits), 0, 3)
    assert session.progress(0).step == 6


@pytest.mark.parametrize("commit_every_s", [60.0, -1.0])
@pytest.mark.parametrize("visit_steps", [50, 4, 1])
def test_an_exploding_loss_leaves_nothing_broken_behind(visit_steps, commit_every_s, digits, tmp_path, monkeypatch):
    """However short the visits: with a lower rate the training is as if it had never exploded."""
    path, gentle = tmp_path / "s", small(train__steps=20, diffusion_blocks__num_blocks=1)
    expected = complete(tmp_path / "plain", gentle, digits)
    monkeypatch.setattr(engine_module, "_COMMIT_EVERY_S", commit_every_s)
    spec = small(optimizer__lr=1e6, train__steps=20, train__visit_steps=visit_steps, diffusion_blocks__num_blocks=1)
    new_session(path, spec)
    for _ in range(2):  # nor does it help to try again
        with pytest.raises(TrainingDiverged, match="block 0 diverged"):
            train_on(path, digits)
    session = Session.open(path)
    assert session.store.verify().digest == session.store.digest()
    assert session.progress(0).step == 0
    session.change(gentle)
    done = train_on(path, digits)
    assert done.summary["loss"] < 2 * math.log(10)
    assert done.digest == expected.digest


@pytest.mark.parametrize("commit_every_s", [60.0, -1.0])
@pytest.mark.parametrize("lengths", [[20], [5] * 4, [1] * 20])
def test_a_run_of_bad_steps_ends_alike_however_it_is_cut(lengths, commit_every_s, digits, tmp_path, monkeypatch):
    """Nine in a row are gone through, ten are not: each visit has an engine of its own here, as after a kill."""
    monkeypatch.setattr(engine_module, "_COMMIT_EVERY_S", commit_every_s)
    spec = small(train__steps=30)
    nine, ten = (batches_of(spec, digits, lambda step, n=n: 4 <= step < 4 + n) for n in (9, 10))
    session = new_session(tmp_path / "nine", spec)
    for length in lengths:
        run_engine(session, nine, 0, length)
    progress = session.progress(0)
    assert (progress.step, progress.skipped) == (20, tuple(range(4, 13)))
    expected = new_session(tmp_path / "whole", spec)
    run_engine(expected, nine, 0, 20)
    assert state(session) == state(expected)
    session = new_session(tmp_path / "ten", spec)
    with pytest.raises(TrainingDiverged, match="up to step 13"):
        for length in lengths:
            run_engine(session, ten, 0, length)


def test_a_finite_but_hopeless_loss_changes_no_weight(digits, tmp_path, monkeypatch):
    session = new_session(tmp_path / "s", small())
    before = state(session)
    monkeypatch.setattr(engine_module, "_HOPELESS_LOSS", 0.1)
    (step,) = run_engine(session, batches_of(session.spec, digits), 0, 1)
    assert (step.loss, session.progress(0).skipped) == (None, (0,))
    assert state(session) == before


@pytest.mark.parametrize("moments_resident", [True, False])
@pytest.mark.parametrize("role", ["weight", "v"])
def test_a_damaged_slot_is_not_trained_on(role, moments_resident, digits, tmp_path):
    session = complete(tmp_path / "s", small(train__steps=2), digits).session
    session.change(small())
    stage = stages_of_block(session.spec, 1)[2]
    layout, slot = stage.layout(session.shapes), session.store.manifest("block01").stages[stage.name].slot
    path = tmp_path / "s" / "stages" / f"{stage.name}.{slot}.safetensors"
    data = bytearray(path.read_bytes())
    begin = len(data) - sum(layout.section_bytes(one) for one in ("weight", "m", "v")[0 if role == "weight" else 2 :])
    data[begin : begin + 400] = b"\xff" * 400
    path.write_bytes(data)
    with pytest.raises(SessionCorrupt, match=f"{path}, {role}: "):
        train_on(tmp_path / "s", digits, choice=Choice(8, "keep", moments_resident))
    if role == "weight":
        with pytest.raises(SessionCorrupt, match=str(path)):
            accuracies(
                Sampler(Session.open(tmp_path / "s"), devices.open_device("cpu"), 64), digits, readouts(2, None, 1)
            )


def test_a_second_training_of_one_block_is_locked_out(digits, tmp_path):
    session = new_session(tmp_path / "s", small())
    with session.store.lock(["block00"]):
        with pytest.raises(SessionLocked, match="block00"):
            train_on(tmp_path / "s", digits, blocks=[0])
        assert train_on(tmp_path / "s", digits, blocks=[1]).summary["digest"]


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "x"}, {"step": -1}, {"step": True}, {"skipped": ["1"]}, {"skipped": None}, {"micro_batches": []},
        {"micro_batches": [[0, 8.0]]}, {"micro_batches": [[0]]}, {"loss": "low"},
    ],
)  # fmt: skip
def test_a_progress_of_another_kind_is_noticed(damage, tmp_path):
    """In a manifest whose checksum is right."""
    session = new_session(tmp_path / "s", small())
    fresh = session.store.manifest("block00").state["blocks"]["0"]
    with session.store.lock(["block00"]):
        session.store.transaction("block00").commit({"blocks": {"0": fresh | damage}})
    with pytest.raises(SessionCorrupt, match="manifest of block 0 holds no progress"):
        Session.open(tmp_path / "s").progress(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__width": 32}, {"train__batch_size": 16}, {"train__seed": 3}, {"diffusion_blocks__num_blocks": 4},
        {"diffusion_blocks__sigma_max": 30.0}, {"data__shift": 0}, {"train__micro_batch": 4}, {"train__steps": 1},
    ],
)  # fmt: skip
def test_what_decided_the_past_cannot_be_changed(changes, digits, tmp_path):
    path = tmp_path / "s"
    new_session(path, small())
    session = train_on(path, digits, stop_after=5).session
    text = (path / "spec.toml").read_text()
    with pytest.raises(UsageError):
        session.change(small(**changes))
    assert (path / "spec.toml").read_text() == text


def test_more_steps_and_another_learning_rate_are_taken(digits, tmp_path):
    path = tmp_path / "s"
    session = complete(path, small(), digits).session
    session.change(small(train__steps=6, optimizer__lr=1e-3))
    done = train_on(path, digits)
    assert done.summary["status"] == "complete"
    assert done.summary["step"] == 6
    assert len(done.visited) == 4


def test_visits_follow_from_the_counters():
    spec = small(train__steps=5, train__visit_steps=2, model__depth=6, diffusion_blocks__num_blocks=3)
    done, made = [0, 0, 0], []
    while (following := next_visit(spec, done, range(3))) is not None:
        block, steps = following
        made.append((block, steps))
        done[block] += steps
    assert done == [5, 5, 5]
    assert [block for block, _ in made] == [2, 1, 0] * 3, "sigma ascends, and a cycle ends on block 0"
    assert [steps for _, steps in made] == [2] * 6 + [1] * 3
    assert next_visit(spec, [4, 4, 3], range(3)) == (2, 1), "a block in the midst of a visit goes on first"
    assert next_visit(spec, [0, 4, 4], [1, 2]) == (2, 1)
    descending = small(train__order="descending")
    assert next_visit(descending, [0, 0], range(2)) == (0, 2)


def test_the_next_blocks_stages_are_read_ahead(digits, tmp_path, monkeypatch):
    asked = []
    real = Store.prefetch

    def prefetch(store, stages):
        names = list(stages)
        asked.append(names)
        real(store, names)

    monkeypatch.setattr(Store, "prefetch", prefetch)
    spec = small(train__steps=4, train__visit_steps=2)
    done = complete(tmp_path / "s", spec, digits)
    visits = [block for block, step in done.visited if step % 2 == 1]
    assert visits == [1, 0, 1, 0]
    assert asked == [[stage.name for stage in stages_of_block(spec, block)] for block in visits[1:]]


# ------------------------------------------------------------------------------------ in a process of its own

_PRELUDE = """
import json, sys
from devices import limits
limits.prepare_process(1)
import torch
torch.set_num_threads(1)
import tests.test_engine as t
from pathlib import Path
folder = Path(sys.argv[1])
digits = t.open_dataset("digits", "train", folder)
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
