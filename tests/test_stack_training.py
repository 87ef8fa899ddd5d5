"""A stack of somebody's own is trained by streaming as ordinary PyTorch trains it, and no choice changes a bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetrain.activations
import edgetrain.streamed
from edgetrain.data.batches import indices_of
from edgetrain.errors import BadInput
from edgetrain.models.stack import StackNetwork
from edgetrain.plan import StreamedChoice
from edgetrain.stages import exact_stages
from tests import stacks
from tests.language_models import advance
from tests.stacks import BATCH, DEPTH, STEPS, WIDTH, Block, new_session, spec_for, stack, weights_of, whole

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = stacks.quiet

LOOPED = [*range(DEPTH), 1, 1, 0]


@pytest.mark.parametrize(("micro_batch", "order"), [(BATCH, []), (4, []), (4, LOOPED)])
def test_it_trains_as_pytorch_does(tmp_path: Path, micro_batch: int, order: list[int]) -> None:
    """Context, constants, weight decay, blocks that run again and micro-batches that do not divide the batch
    included."""
    made = stack(order=order)
    spec = new_session(tmp_path / "s", made).spec
    model = whole(made)
    model.load_state_dict(weights_of(tmp_path / "s", made))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    advance(tmp_path / "s", StreamedChoice(micro_batch), data=made)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=3e-3, fused=True
    )
    for step in range(STEPS):
        numbers = step * BATCH + np.arange(BATCH)
        pairs = [made.data[i] for i in indices_of(spec.train.seed, 0, numbers, len(made.data)).tolist()]
        x, y = torch.stack([x for x, _ in pairs]).float(), torch.tensor([int(y) for _, y in pairs])
        hidden, context = model["stem"](x)
        for number in order or range(DEPTH):
            hidden = model["blocks"][number](hidden, **context)
        optimizer.zero_grad()
        F.cross_entropy(model["head"](hidden), y).backward()
        optimizer.step()
    found = weights_of(tmp_path / "s", made)
    assert found.keys() == start.keys()
    for name, expected in model.state_dict().items():
        if not name.endswith("scale"):
            assert (expected - start[name]).abs().max() > 1e-3, name
        assert (found[name] - expected).abs().max() < 1e-6, name


CHOICES = [
    StreamedChoice(4, activations, kept, resident, boundaries)
    for activations, kept, resident, boundaries in itertools.product(
        ("recompute", "offload"), (0, 1, DEPTH), (False, True), ("memory", "moved")
    )
]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(("dropout", "order"), [(0.0, []), (0.4, []), (0.4, LOOPED)])
def test_no_choice_changes_a_bit(
    tmp_path: Path, device: str, dropout: float, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, and examples that draw random numbers, each read several times."""
    for module in (edgetrain.activations, edgetrain.streamed):
        monkeypatch.setattr(module, "SMALLEST_OFFLOADED_BYTES", 64)
    made = stack(dropout, noise=0.5, order=order)
    done = []
    for number, choice in enumerate(CHOICES):
        new_session(tmp_path / str(number), made, train__steps=2)
        torch.rand(number)  # what else draws must not matter
        done.append(advance(tmp_path / str(number), choice, device, data=made))
        assert done[-1] == done[0], choice
    assert None not in done[0].losses


def test_dropout_drops_and_goes_on_after_a_stop_as_if_there_was_none(tmp_path: Path) -> None:
    made = stack(0.4)
    digests = []
    for name, parts in (("whole", (4,)), ("stopped", (1, 2, 1))):
        new_session(tmp_path / name, made, train__steps=4)
        for steps in parts:
            torch.manual_seed(steps)
            done = advance(tmp_path / name, StreamedChoice(4), data=made, steps=steps)
        digests.append(done.digest)
    assert digests[0] == digests[1]
    without = stack()
    new_session(tmp_path / "without", without, train__steps=4)
    assert advance(tmp_path / "without", StreamedChoice(4), data=without).digest != digests[0]


def test_masks_differ_by_step_block_and_micro_batch() -> None:
    made = stack(0.5)
    network = StackNetwork(spec_for(made), made)
    module = drop = nn.Dropout(0.5)
    seen = set()
    for position in itertools.product((2, 3), (0, 1), (0, 4)):
        network.prepare(module, *position)
        first = drop(torch.ones(64))
        network.prepare(module, *position)
        assert torch.equal(first, drop(torch.ones(64)))
        seen.add(tuple(first.tolist()))
    assert len(seen) == 8


def test_a_block_that_runs_again_draws_anew() -> None:
    made = stack(0.5, order=LOOPED)
    stages = exact_stages(spec_for(made))
    assert len(stages.layers) == len(LOOPED)
    assert len(stages.units) == DEPTH + 2
    assert len({stages.random_index(position) for position in range(len(LOOPED))}) == len(LOOPED)


@pytest.mark.parametrize("order", [[0], [*range(DEPTH), DEPTH], [-1, *range(DEPTH)]])
def test_an_order_runs_every_block_there_is(order: list[int]) -> None:
    with pytest.raises(BadInput, match="order is"):
        stack(order=order)


@pytest.mark.parametrize("left_out", ["stem", "head", "both"])
def test_stem_and_head_are_optional_and_may_have_no_parameters(tmp_path: Path, left_out: str) -> None:
    bare = {
        "stem": {"stem": nn.Flatten, "data": [(torch.ones(WIDTH, 1) * i, i % 3) for i in range(7)]},
        "head": {"head": nn.ReLU},
        "both": {"stem": None, "head": None, "data": [(np.full(WIDTH, i), i % 3) for i in range(7)]},
    }[left_out]
    if left_out == "both":
        bare["data"] = [(np.full(WIDTH, i, np.float64), i % 3) for i in range(7)]
    made = stack(**bare)
    new_session(tmp_path / "s", made)
    before = weights_of(tmp_path / "s", made)
    done = advance(tmp_path / "s", StreamedChoice(4), data=made)
    after = weights_of(tmp_path / "s", made)
    assert done.losses[0] != done.losses[-1]
    assert {name.split(".")[0] for name in after} == {
        "stem": {"blocks", "head"}, "head": {"stem", "blocks"}, "both": {"blocks"}
    }[left_out]  # fmt: skip
    assert not torch.equal(before["blocks.0.up.weight"], after["blocks.0.up.weight"])


def test_initial_values_are_the_modules_own_and_a_function_of_seed_and_place(tmp_path: Path) -> None:
    made = stack()
    first, again, other = (
        new_session(tmp_path / str(i), made, train__seed=seed) and weights_of(tmp_path / str(i), made)
        for i, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.up.weight"], other["blocks.0.up.weight"])
    assert not torch.equal(first["blocks.0.up.weight"], first["blocks.1.up.weight"])
    assert first["blocks.0.norm.weight"].eq(1).all()
    bound = WIDTH**-0.5
    assert 0.9 * bound < first["blocks.2.up.weight"].abs().max() <= bound
    assert torch.equal(first["blocks.0.scale"], Block().scale)


def test_bf16_weights_are_those_rounded(tmp_path: Path) -> None:
    made = stack()
    new_session(tmp_path / "a", made)
    new_session(tmp_path / "b", made, exact__weights="bf16")
    wide, narrow = weights_of(tmp_path / "a", made), weights_of(tmp_path / "b", made)
    assert torch.equal(narrow["head.weight"], wide["head.weight"].bfloat16().float())
