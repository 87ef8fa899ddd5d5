"""The plan of a spec, whatever its objective: which probe it needs, and what follows from it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetrain import plan, streamed_plan
from edgetrain.plan import Plan, Probe
from edgetrain.spec import Spec
from edgetrain.streamed_plan import StreamedProbe


def parse_probe(spec: Spec, measured: Mapping[str, Any]) -> Probe | StreamedProbe:
    """KeyError or TypeError if it is no measurement for this spec."""
    return StreamedProbe.from_json(measured) if spec.is_exact else Probe.from_json(measured)


def make_plan(
    spec: Spec,
    probe: Probe | StreamedProbe,
    budget_bytes: int,
    num_threads: int,
    activations: str | None = None,
    *,
    spec_is_fixed: bool = False,
) -> Plan:
    """The fastest way to train inside the budget. ``spec_is_fixed``: the error proposes no other spec.

    Raises:
        BudgetInfeasible: there is none; names the largest owner, the smallest budget, and what lowers it most.
    """
    if isinstance(probe, StreamedProbe):
        return streamed_plan.make_streamed_plan(
            spec, probe, budget_bytes, num_threads, activations, spec_is_fixed=spec_is_fixed
        )
    return plan.make_plan(spec, probe, budget_bytes, num_threads, activations, spec_is_fixed=spec_is_fixed)


def smallest_budget_bytes(spec: Spec, probe: Probe | StreamedProbe, activations: str | None) -> int:
    """The least with which training is planned."""
    if isinstance(probe, StreamedProbe):
        return streamed_plan.smallest_streamed_budget_bytes(spec, probe, activations)
    return plan.smallest_budget_bytes(spec, probe, activations)
