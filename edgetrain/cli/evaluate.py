"""edgetrain evaluate"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from edgetrain.cli import options


@click.command("evaluate")
@options.SESSION
@options.DATA
@options.BUDGET
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--euler-steps", type=click.IntRange(1), help="Steps of the chain.  [one for each block]")
@click.option("--draws", type=click.IntRange(1), default=8, show_default=True, help="Noise draws to average.")
@options.DEVICE
@options.THREADS
@options.JSON
def command(
    session: Path,
    data: str | None,
    budget: int | None,
    split: str,
    euler_steps: int | None,
    draws: int,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Accuracy of SESSION's model: the chain of Euler steps, and block 0 alone at sigma_max.

    \b
    Example:
      edgetrain evaluate my-session --json
    """
    options.check_device(device)
    from edgetrain.session import Session

    found = Session.open(session)
    budget = options.saved_budget(found, budget)
    spec = found.spec
    if data is not None:
        spec = replace(spec, data=replace(spec.data, source=data))
    scratch = click.get_current_context().with_resource(options.temporary_folder())
    _, dataset = options.open_data(spec, split, Path(scratch))
    options.start_torch(threads)
    import devices
    from devices import meter
    from devices.limits import is_out_of_memory
    from edgetrain.errors import BudgetBroken
    from edgetrain.governor import Governor
    from edgetrain.sampling import CHUNK_BYTES, Sampler, accuracies, readouts
    from edgetrain.units import format_bytes

    rows = readouts(spec.num_blocks, euler_steps, draws)
    micro_batch = min(found.progress(b).micro_batches[-1][1] for b in range(spec.num_blocks))
    sampler = Sampler(found, devices.open_device(device), micro_batch)
    sampler.warm_up()
    governor = Governor(budget)
    with governor.hold(CHUNK_BYTES):
        try:
            values = accuracies(sampler, dataset, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BudgetBroken(
                f"evaluating one example at a time needs more than {format_bytes(budget)} of memory: {error}",
                "Raise --memory-budget.",
            ) from error
    governor.check()
    results = [
        {"metric": "accuracy", "value": values[row.name], "readout": row.name, "split": split,
         "num_examples": dataset.num_examples}
        for row in rows
    ]  # fmt: skip
    peak = meter.usage().peak_bytes
    value = {"session": str(session), "results": results, "peak_bytes": peak, "budget_bytes": budget}

    def text() -> str:
        lines = [f"{r['readout']:18} accuracy {r['value']:6.2f} %" for r in results]
        return "\n".join([
            *lines,
            f"{dataset.num_examples} {split} examples; peak {format_bytes(peak)} of {format_bytes(budget)}",
        ])  # fmt: skip

    options.emit(value, as_json, text)
