"""The plan from a measurement that is made up: what it predicts, chooses and refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from edgetrain import plan as planning
from edgetrain.errors import BudgetInfeasible
from edgetrain.plan import Curve, Probe, make_plan, save_probe, saved_probe
from edgetrain.recipe import resolve
from edgetrain.spec import Spec

MIB = 1 << 20
SHAPES = {
    "codebook": {"rows": [10, 64]},
    "stem": {"patches": [64, 64]},
    "layer": {"up": [1024, 1024]},
    "head": {"readout": [10, 64]},
}


def spec_of(**changes: Any) -> Spec:
    base = {
        "model.width": 64, "model.depth": 4, "model.heads": 2, "model.patch": 2, "model.image_shape": [1, 8, 8],
        "model.num_classes": 10, "diffusion_blocks.num_blocks": 2, "train.batch_size": 64, "train.visit_steps": 10,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


def measured(**changes: Any) -> dict[str, Any]:
    """1 MiB an example and layer with keep, a quarter with the others; a fifth more time for recompute."""

    def rows(of: float) -> list[list[tuple[int, float]]]:
        return [[(m, of * m * layers) for m in (1, 16, 32)] for layers in (1, 2, 3)]

    curves = {"keep": 1.0, "recompute": 0.25, "offload": 0.25}
    times = {"keep": 1.0, "recompute": 1.2, "offload": 2.0}
    return {
        "shapes": SHAPES,
        "budget_bytes": None,
        "own_bytes": 0,
        "runtime_bytes": 250 * MIB,
        "step_bytes": {kind: {"points": rows(MIB * of), "bounds": [None] * 3} for kind, of in curves.items()},
        "step_s": {kind: rows(0.001 * of) for kind, of in times.items()},
        "heap": None,
    } | changes


def plan_of(budget_mib: int, spec: Spec | None = None, **how: Any) -> planning.Plan:
    return make_plan(spec or spec_of(), Probe.from_json(measured()), budget_mib * MIB, 1, **how)


def test_freed_memory_is_kept_where_the_budget_has_room_for_its_holes():
    def planned(budget_mib: int, heap: float | None) -> planning.Plan:
        return make_plan(spec_of(), Probe.from_json(measured(heap=heap)), budget_mib * MIB, 1)

    roomy, without = planned(4000, 0.7), planned(4000, None)
    assert roomy.choice.keeps_freed and not without.choice.keeps_freed
    assert roomy.owners["holes"] > 0.2 * roomy.owners["activations"]
    assert roomy.step_s < without.step_s
    assert "freed memory used again" in roomy.choice.describe()
    tight = planned(math.ceil(without.smallest_budget_bytes / MIB), 0.7)
    assert not tight.choice.keeps_freed
    assert tight.smallest_budget_bytes == without.smallest_budget_bytes


def test_a_curve_goes_through_its_points_and_on_by_the_steepest_line():
    flat_then_steep = Curve([[(1, 10.0), (4, 10.0), (8, 30.0)], [(1, 12.0), (4, 15.0), (8, 50.0)]])
    assert [flat_then_steep.at(1, m) for m in (1, 2, 4, 8, 16)] == [10, 10, 10, 30, 70]
    assert flat_then_steep.at(2, 8) == 50
    assert flat_then_steep.at(4, 8) == 50 + 2 * 20
    assert flat_then_steep.at(1, 6) == 20


def test_what_did_not_fit_bounds_what_is_larger_and_nothing_else():
    points = [[(1, 10.0), (4, 12.0)], [(1, 12.0), (4, 15.0)]]
    without, curve = Curve(points), Curve(points, [None, (8, 100.0)])
    assert curve.at(2, 8) == curve.at(2, 9) == curve.at(3, 8) == 100
    assert curve.at(1, 8) == without.at(1, 8)
    for micro_batch in (1, 2, 4, 7):
        assert curve.at(2, micro_batch) == without.at(2, micro_batch)


def test_with_room_everything_stays():
    plan = plan_of(4000)
    assert (plan.choice.micro_batch, plan.choice.activations, plan.choice.moments_resident) == (64, "keep", True)
    assert sum(plan.owners.values()) == plan.peak_bytes
    assert plan.owners["activations"] == 128 * MIB


def test_with_less_room_it_gives_up_what_costs_least():
    room = plan_of(4000).peak_bytes // MIB
    less = plan_of(room - 30)
    assert less.peak_bytes < (room - 30) * MIB
    assert less.step_s >= plan_of(4000).step_s
    assert plan_of(room - 30, activations="recompute").choice.activations == "recompute"


def test_a_refusal_names_a_budget_that_does_even_if_the_next_probe_measures_a_little_more():
    with pytest.raises(BudgetInfeasible) as refused:
        plan_of(200)
    named = int(str(refused.value.hint).split("--memory-budget ")[1].split("MiB")[0])
    a_little_more = Probe.from_json(measured(runtime_bytes=252 * MIB))
    assert make_plan(spec_of(), a_little_more, named * MIB, 1).peak_bytes <= named * MIB
    assert named * MIB < 1.05 * plan_of(named).peak_bytes
    assert "num_blocks=4" in str(refused.value.hint)
    assert "runtime" in str(refused.value)


def test_a_fixed_spec_gets_no_advice_to_change_it():
    with pytest.raises(BudgetInfeasible) as refused:
        plan_of(200, spec_is_fixed=True)
    assert "--set" not in str(refused.value.hint)


def test_no_budget_below_what_the_probe_itself_takes():
    probe = Probe.from_json(measured(own_bytes=400 * MIB))
    with pytest.raises(BudgetInfeasible):
        make_plan(spec_of(), probe, 399 * MIB, 1)
    assert make_plan(spec_of(), probe, 400 * MIB, 1).smallest_budget_bytes == 400 * MIB


def test_streamed_moments_are_written_at_every_step():
    resident = plan_of(4000)
    weights = resident.owners["weights"]
    tight = (250 + 1 + 10 + 2) * MIB + 2 * weights + 8 * MIB  # room for the slices of 4 MiB each, not for the moments
    streamed = make_plan(spec_of(), Probe.from_json(measured()), tight, 1)
    assert not streamed.choice.moments_resident
    assert resident.written_bytes_per_step == 3 * weights // 10
    assert streamed.written_bytes_per_step == (1 + 2 * 10) * weights // 10


def test_the_cache_tells_measurements_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = spec_of()
    assert saved_probe(spec, "cpu", 2) is None
    save_probe(spec, "cpu", 2, measured(budget_bytes=300 * MIB))
    found = saved_probe(spec, "cpu", 2)
    assert found is not None
    probe = Probe.from_json(found)
    assert probe.covers(300 * MIB)
    assert not probe.covers(301 * MIB), "more may fit by now"
    assert saved_probe(spec, "cpu", 1) is None
    deeper = replace(spec, model=replace(spec.model, depth=8), data=replace(spec.data, source="/elsewhere"))
    assert saved_probe(deeper, "cpu", 2) is not None
    others = (
        spec_of(model__width=32), spec_of(train__micro_batch=8), spec_of(data__shift=2),
        spec_of(train__objective="exact"), spec_of(diffusion_blocks__streams=1),
        spec_of(diffusion_blocks__auxiliary=0.5),
    )  # fmt: skip
    for other in others:
        assert saved_probe(other, "cpu", 2) is None
    for path in (tmp_path / "edgetrain").iterdir():
        path.write_text("{")
    assert saved_probe(spec, "cpu", 2) is None
