"""What a step of the engine changes: the active block alone, as a plain PyTorch loop does, and it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import devices
from edgetrain.activations import Keep
from edgetrain.blockwise import build_modules
from edgetrain.data import open_dataset
from edgetrain.models import build_family
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Choice
from edgetrain.sampling import Sampler, accuracies, readouts
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from tests.block_sessions import batches_of, complete, new_session, paper, run_engine, small, state, tensors, train_on

pytestmark = pytest.mark.usefixtures("one_thread")


def slot_bytes(path: Path, prefix: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "stages").glob(f"{prefix}*"))}


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
