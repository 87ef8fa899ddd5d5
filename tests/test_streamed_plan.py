"""The plan of exact training from a made-up probe, and the sizes it rests on against the trainer's own."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, Literal

import pytest

import edgetrain.streamed_probe
from devices.memory import HostMemory
from edgetrain.errors import BudgetInfeasible
from edgetrain.models import build_network
from edgetrain.plan import Curve, Plan, StreamedChoice
from edgetrain.recipe import resolve
from edgetrain.spec import Spec
from edgetrain.stages import exact_stages
from edgetrain.streamed import StreamedTrainer
from edgetrain.streamed_plan import (
    LayerProbe,
    StreamedProbe,
    _Sizes,
    make_streamed_plan,
    smallest_streamed_budget_bytes,
)
from edgetrain.streamed_probe import _Measurement
from edgetrain.units import MIB
from tests.language_models import advance, cut_small, data_of, make_spec, new_session, open_trainer, shapes

SMOL = {
    "model": {
        "family": "llama", "vocab_size": 49152, "width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
        "mlp_width": 1536, "max_length": 2048,
    },
    "data": {"source": "none", "length": 256},
    "train": {"objective": "exact", "batch_size": 16},
}  # fmt: skip


def smol(**changes: Any) -> Spec:
    return resolve(SMOL, {name.replace("__", "."): value for name, value in changes.items()})


def line(per_example: float, fixed: float = 0.0) -> Curve:
    return Curve([[(n, fixed + per_example * n) for n in (1, 2, 4)]])


def made_up(spec: Spec, saved: float = 6e6, own_bytes: int = 240 * MIB) -> StreamedProbe:
    """A machine on which recomputing costs a third more and offloading a fifth more."""
    per_layer = LayerProbe(line(saved), {"recompute": line(0.4), "keep": line(0.3), "offload": line(0.36)})
    boundary_bytes = 4 * spec.text.length * spec.language.width
    return StreamedProbe(
        shapes(spec), None, own_bytes, 230 * MIB, boundary_bytes, 0, line(30e6, 2e6), line(8e6), {"layer": per_layer},
        line(0.05, 0.01), {"recompute": line(0.05), "keep": line(0.03), "offload": line(0.04)},
    )  # fmt: skip


SPECS = {
    "tiny": make_spec(train__batch_size=4),
    "smol": smol(),
    "smol, one example at a time": smol(train__micro_batch=1),
    "lora": smol(exact__train="lora"),
    "last layers": smol(exact__train="last", exact__last_layers=3),
    "clipped as a whole": smol(optimizer__clip_over="global"),
}


def budgets(spec: Spec, probe: StreamedProbe) -> list[int]:
    """From the smallest to more than is of any use."""
    smallest = smallest_streamed_budget_bytes(spec, probe, None)
    return [smallest + round(i**3 * 60 * MIB) for i in range(9)]


LLAMA_1B = resolve({
    "model": {
        "family": "llama", "vocab_size": 128256, "width": 2048, "depth": 16, "heads": 32, "kv_heads": 8, "head_dim": 64,
        "mlp_width": 8192, "max_length": 2048,
    },
    "data": {"source": "none", "length": 256},
    "train": {"objective": "exact", "batch_size": 2},
})  # fmt: skip


@pytest.mark.parametrize("train", ["all", "lora"])
def test_where_a_layer_is_the_floor_its_matrices_come_in_tiles(train: Literal["all", "lora"]) -> None:
    spec = dataclasses.replace(LLAMA_1B, exact=dataclasses.replace(LLAMA_1B.exact, train=train))
    probe = made_up(spec)
    smallest = smallest_streamed_budget_bytes(spec, probe, None)
    layer_bytes = 4 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    tight = make_streamed_plan(spec, probe, smallest, 1)
    assert isinstance(tight.choice, StreamedChoice) and tight.choice.tiled
    held = tight.owners["weights"] + tight.owners["gradients"]
    assert held < layer_bytes / 4
    roomy = make_streamed_plan(spec, probe, smallest + 64 * layer_bytes, 1)
    assert isinstance(roomy.choice, StreamedChoice) and not roomy.choice.tiled
    if train == "all":  # of what is frozen no gradient goes anywhere
        assert tight.scratch_bytes_per_step > 16 * layer_bytes * 0.9


@pytest.mark.parametrize("model", ["vit", "ar"])
def test_a_model_without_a_table_is_planned(model: str) -> None:
    spec = make_spec(model)
    layer = LayerProbe(line(6e6), {kind: line(0.3) for kind in ("recompute", "keep", "offload")})
    probe = dataclasses.replace(made_up(smol()), shapes=shapes(spec), layers={"layer": layer})
    for budget in (300 * MIB, 4 << 30):
        plan = make_streamed_plan(spec, probe, budget, 1)
        assert plan.owners.get("logits", 0) == 0 and plan.peak_bytes <= budget


def test_a_plan_tells_what_bf16_would_bring() -> None:
    probe = dataclasses.replace(made_up(smol()), bf16_speedup=1.9)
    assert make_streamed_plan(smol(), probe, 4 << 30, 1).bf16_speedup == 1.9
    assert make_streamed_plan(smol(exact__compute="bf16"), probe, 4 << 30, 1).bf16_speedup == 1.0


@pytest.mark.parametrize("name", SPECS)
def test_more_memory_is_never_slower(name: str) -> None:
    spec = SPECS[name]
    probe = made_up(spec)
    plans = [make_streamed_plan(spec, probe, budget, 1) for budget in budgets(spec, probe)]
    for plan in plans:
        assert sum(plan.owners.values()) == plan.peak_bytes
        assert min(plan.owners.values()) >= 0
        assert plan.peak_bytes + 10 * MIB <= plan.budget_bytes
        assert plan.smallest_budget_bytes == plans[0].budget_bytes
        assert 1 <= plan.choice.micro_batch <= spec.train.batch_size
    for small, large in itertools.pairwise(plans):
        assert large.step_s <= small.step_s * 1.05, "what a probe's clock can tell apart"
    last = plans[-1].choice
    assert isinstance(last, StreamedChoice)
    assert last.resident
    assert last.kept_layers == spec.model.depth
    if name != "tiny":
        assert plans[-1].step_s < 0.9 * plans[0].step_s
        assert not plans[0].choice.resident  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SPECS)
def test_a_budget_too_small_is_refused_with_the_one_that_does(name: str) -> None:
    spec = SPECS[name]
    probe = made_up(spec)
    smallest = smallest_streamed_budget_bytes(spec, probe, None)
    with pytest.raises(BudgetInfeasible) as caught:
        make_streamed_plan(spec, probe, smallest - 1, 1)
    assert caught.value.exit_code == 3
    assert f"({smallest} bytes)" in str(caught.value)
    advised = math.ceil(smallest * 1.01 / MIB)
    assert f"--memory-budget {advised}MiB" in str(caught.value)
    make_streamed_plan(spec, probe, advised * MIB, 1)
    make_streamed_plan(spec, probe, smallest, 1)


def test_a_refusal_names_what_lowers_the_smallest() -> None:
    spec = smol(train__micro_batch=8)
    probe = made_up(spec)
    with pytest.raises(BudgetInfeasible, match=r"train\.micro_batch=1, with which (\d+)MiB will do") as caught:
        make_streamed_plan(spec, probe, 100 * MIB, 1)
    named = int(str(caught.value).split("with which ")[1].split("MiB")[0])
    one = dataclasses.replace(spec, train=dataclasses.replace(spec.train, micro_batch=1))
    assert make_streamed_plan(one, probe, named * MIB, 1).choice.micro_batch == 1
    with pytest.raises(BudgetInfeasible, match=r"data\.length"):
        make_streamed_plan(smol(), probe, 100 * MIB, 1)


def test_no_budget_below_the_probes_own_peak() -> None:
    spec = SPECS["tiny"]
    probe = made_up(spec, own_bytes=900 * MIB)
    with pytest.raises(BudgetInfeasible):
        make_streamed_plan(spec, probe, 899 * MIB, 1)
    make_streamed_plan(spec, probe, 900 * MIB, 1)


def test_what_is_forced_is_chosen() -> None:
    spec = smol()
    probe = made_up(spec)
    for forced in ("recompute", "offload"):
        choice = make_streamed_plan(spec, probe, 8000 * MIB, 1, forced).choice
        assert isinstance(choice, StreamedChoice)
        assert (choice.activations, choice.kept_layers) == (forced, 0)
    choice = make_streamed_plan(spec, probe, 8000 * MIB, 1, "keep").choice
    assert isinstance(choice, StreamedChoice)
    assert choice.kept_layers == 30
    with pytest.raises(BudgetInfeasible):
        make_streamed_plan(spec, probe, 400 * MIB, 1, "keep")


def test_freed_memory_is_used_again_as_soon_as_the_holes_fit() -> None:
    spec = smol(train__micro_batch=1)
    probe = dataclasses.replace(made_up(spec), hole_bytes=line(20e6))
    smallest = smallest_streamed_budget_bytes(spec, probe, None)
    plans = [make_streamed_plan(spec, probe, smallest + spare, 1, "recompute") for spare in (0, 30 * MIB)]
    assert [plan.choice.keeps_freed for plan in plans] == [False, True]  # type: ignore[union-attr]
    holes = plans[1].owners["holes"] - plans[1].owners["activations"] // 4
    assert plans[1].choice.logits == "recompute"  # type: ignore[union-attr]
    assert holes == 20_000_000
    lucky = make_streamed_plan(spec, made_up(spec), 8000 * MIB, 1, "recompute")  # its probe found room in the heap
    assert lucky.owners.get("holes", 0) >= 0.6 * min(lucky.owners["activations"], 20 * MIB)
    assert plans[1].step_s < 0.9 * plans[0].step_s
    for budget in budgets(spec, probe):
        assert not make_streamed_plan(spec, probe, budget, 1, "offload").choice.keeps_freed  # type: ignore[union-attr]


def test_context_counts_with_its_gradient_for_every_example() -> None:
    spec = smol()
    without = made_up(spec)
    probe = dataclasses.replace(without, context_bytes=MIB)
    kept = StreamedChoice(4, boundaries="memory")
    found = _Sizes(spec, probe).owners(kept)["boundaries"] - _Sizes(spec, without).owners(kept)["boundaries"]
    assert found == 2 * 16 * MIB
    moved = StreamedChoice(4, boundaries="moved")
    assert "boundaries" not in _Sizes(spec, probe).owners(moved)
    assert _Sizes(spec, probe).scratch_bytes(moved) > _Sizes(spec, without).scratch_bytes(moved) + 16 * MIB


def test_depth_costs_disk_and_not_memory() -> None:
    """Thirty layers need what ten do, but for what lies between them."""
    smallest = {}
    for depth in (10, 30):
        spec = smol(model__depth=depth)
        smallest[depth] = smallest_streamed_budget_bytes(spec, made_up(spec), None)
    assert smallest[30] == smallest[10]


def test_a_probe_comes_back_from_json() -> None:
    spec = SPECS["tiny"]
    probe = made_up(spec)
    points = lambda curve: curve.points[0]  # noqa: E731
    value = {
        "shapes": probe.shapes, "budget_bytes": None, "own_bytes": probe.own_bytes,
        "runtime_bytes": probe.runtime_bytes, "boundary_bytes": probe.boundary_bytes, "context_bytes": 0,
        "step_bytes": points(probe.step_bytes),
        "hole_bytes": points(probe.hole_bytes),
        "fixed_s": points(probe.fixed_s),
        "layers": {
            kind: {"saved_bytes": points(one.saved_bytes), "seconds": {k: points(c) for k, c in one.seconds.items()}}
            for kind, one in probe.layers.items()
        },
        "chunk_s": {kind: points(one) for kind, one in probe.chunk_s.items()}, "bf16_speedup": probe.bf16_speedup,
    }  # fmt: skip
    again: list[Plan] = [make_streamed_plan(spec, one, 400 * MIB, 1) for one in (probe, StreamedProbe.from_json(value))]
    assert again[0] == again[1]


CHOICES = [
    StreamedChoice(2),
    StreamedChoice(2, kept_layers=3),
    StreamedChoice(2, resident=True),
    StreamedChoice(2, kept_layers=1, resident=True),
    StreamedChoice(2, tiled=True),
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__tied": False},
        {"exact__train": "lora"},
        {"exact__train": "last"},
        {"optimizer__clip_over": "global"},
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_buffers_are_what_the_trainer_allocates(
    changes: dict[str, Any], choice: StreamedChoice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch.setattr)
    spec = make_spec(model__width=64, model__mlp_width=256, model__head_dim=16, **changes)
    sizes = _Sizes(spec, made_up(spec))
    owners = sizes.owners(choice)
    trainer = open_trainer(new_session(tmp_path / "s", spec), choice)
    buffers = sum(owners[name] for name in ("weights", "gradients", "moments", "resident"))
    allocated = trainer.device.allocated_bytes()
    assert abs(allocated - buffers) <= 4096 * (2 + 5 * len(exact_stages(spec).units)), "but for whole pages"
    assert abs(allocated - buffers) <= 0.25 * buffers
    if choice.kept_layers:
        return
    done = advance(tmp_path / "s", choice, steps=1)
    spilled = sum(buffer.nbytes for buffer in done.trainer._spill._held.values())
    assert owners.get("spilled", 0) == (spilled if choice.resident else 0)
    tiles = done.trainer.residency.window.tiles
    moved = tiles.moved_bytes // 2 if tiles else 0  # the other half was to warm up
    assert choice.resident or abs(sizes.scratch_bytes(choice) - spilled - moved) <= 4096 * choice.tiled * len(
        sizes._known
    )


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.usefixtures("one_thread")
def test_large_layers_are_measured_in_tiles(train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe itself needs no more than a training in tiles."""
    cut_small(monkeypatch.setattr)
    monkeypatch.setattr(edgetrain.streamed_probe, "_TILED_FROM_ELEMENTS", 1)
    opened: list[StreamedTrainer] = []
    real = _Measurement._trainer

    def trainer(self: _Measurement, *arguments: Any) -> StreamedTrainer:
        opened.append(real(self, *arguments))
        return opened[-1]

    monkeypatch.setattr(_Measurement, "_trainer", trainer)
    spec = make_spec(exact__train=train)
    data = data_of(spec)
    data.tokens[:] = 0  # a probe has one chunk of the table
    network = build_network(spec, data)
    measured = edgetrain.streamed_probe.measure(spec, network, shapes(spec), "cpu", 4 << 30)
    assert opened and all(one.choice.tiled for one in opened)
    assert any(one.residency.window.tiles.moved_bytes for one in opened) == (train == "all")  # type: ignore[union-attr]
    probe = StreamedProbe.from_json(measured)
    assert min(value for _, value in probe.layers["layer"].saved_bytes.points[0]) >= 0
    assert make_streamed_plan(spec, probe, 4 << 30, 1).peak_bytes > 0


def test_holes_that_do_not_fit_are_measured_again_for_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left out for lack of room must not count as known."""
    measurement = object.__new__(_Measurement)
    measurement.budget_bytes, measurement.own_bytes, measurement.bounded = 300 * MIB, 0, False
    measurement.memory = HostMemory()

    def from_heap(self: _Measurement, unit: Any, n: int) -> int:
        if n == 2:
            raise MemoryError
        return 12 * MIB

    monkeypatch.setattr(_Measurement, "_limit", lambda self, optional: None)
    monkeypatch.setattr(_Measurement, "_from_heap", from_heap)
    holes = measurement._holes({"layer": None}, [(1, 10 * MIB), (2, 20 * MIB)])  # type: ignore[dict-item]
    assert holes == [(1, 2 * MIB), (2, 300 * MIB)]
    assert measurement.bounded
