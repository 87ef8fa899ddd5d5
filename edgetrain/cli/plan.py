"""edgetrain plan"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from edgetrain.plan import Plan
    from edgetrain.session import Session

_WORTH_SAYING = 1.2
_EXPORTER_BYTES = 50 << 20
_COPIES_OF_A_PART = 4
"""What torch.onnx.export takes beside torch itself, and how many times over it holds a part: measured at 128 MiB."""


@click.command("plan")
@click.argument("session", type=click.Path(path_type=Path, file_okay=False), required=False)
@options.RECIPE
@options.BUDGET
@options.DATA
@options.SET
@options.ACTIVATIONS
@options.DEVICE
@options.THREADS
@options.JSON
def command(
    session: Path | None,
    recipe: str | None,
    budget: int | None,
    data: str | None,
    assignments: tuple[str, ...],
    activations: str | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Predict the memory of a training, by owner, before any of it is done. Exit code 3: it does not fit.

    \b
    Example:
      edgetrain plan --recipe vit-digits --memory-budget 350MiB
    """
    options.check_device(device)
    from edgetrain import planning
    from edgetrain.cli.probe import probed
    from edgetrain.session import Session
    from edgetrain.spec import StackSpec
    from edgetrain.units import advised_mib, format_bytes, format_seconds

    if (session is None) == (recipe is None):
        raise UsageError(
            "plan needs a session, or --recipe", "edgetrain plan --recipe vit-digits --memory-budget 350MiB"
        )
    if session is not None:
        if data is not None or assignments:
            raise UsageError("--data and --set belong to --recipe: a session has its own data and settings")
        found = Session.open(session)
        spec = found.spec
        budget = options.saved_budget(found, budget)
        plan = options.plan_of_session(found, spec, device, threads, budget, activations)
        plan = dataclasses.replace(plan, session_bytes=found.store.num_bytes)  # what is frozen need not be copied
    else:
        if budget is None:
            raise UsageError("plan needs --memory-budget", "For example --memory-budget 350MiB.")
        spec, _ = options.with_shapes(options.new_spec(recipe or "", data, None, assignments), needs_data=False)
        plan = planning.make_plan(
            spec, probed(spec, device, threads, budget, activations), budget, threads, activations
        )
    written, scratch = plan.written_bytes_per_step, plan.scratch_bytes_per_step
    export_bytes = _export_bytes(found, plan) if session is not None and isinstance(spec.model, StackSpec) else None

    def text() -> str:
        lines = [f"{name:12} {format_bytes(size):>12}" for name, size in plan.owners.items()]
        faster = [
            f"products in bf16 would be {plan.bf16_speedup:.1f} times as fast here: --set exact.compute=bf16"
        ] if plan.bf16_speedup > _WORTH_SAYING else []  # fmt: skip
        return "\n".join([
            *lines,
            f"{'peak':12} {format_bytes(plan.peak_bytes):>12}   of a budget of {format_bytes(plan.budget_bytes)}; "
            f"the smallest to name is {advised_mib(plan.smallest_budget_bytes)}MiB",
            f"micro-batch {plan.choice.micro_batch} of {spec.train.batch_size}, {plan.choice.describe()}, "
            f"about {format_seconds(plan.step_s)} a step",
            f"disk: session {format_bytes(plan.session_bytes)}; written a step {format_bytes(written)}, to scratch "
            f"{format_bytes(scratch)}: {(written + scratch) * 1000 / 1e12:.5f} TB per 1000 steps",
            *faster,
            *([] if export_bytes is None else [f"an export to ONNX takes about {format_bytes(export_bytes)}"]),
        ])  # fmt: skip

    options.emit(plan.to_json() | ({} if export_bytes is None else {"export_bytes": export_bytes}), as_json, text)


def _export_bytes(session: Session, plan: Plan) -> int:
    """Of a stack of somebody's own, whose parts torch's exporter copies."""
    from edgetrain.stages import exact_stages

    stages = exact_stages(session.spec).stages
    largest = max(layout.section_bytes(layout.roles[0].name) for layout in map(session.layout, stages))
    return plan.owners["runtime"] + _EXPORTER_BYTES + _COPIES_OF_A_PART * largest
