"""edgetrain status"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgetrain.cli import options


@click.command("status")
@options.SESSION
@options.JSON
def command(session: Path, as_json: bool) -> None:
    """Show how far each block of SESSION is. Instant: it reads manifests alone.

    \b
    Example:
      edgetrain status my-session --json
    """
    from edgetrain.session import Session
    from edgetrain.stages import group_of_block

    found = Session.open(session)
    spec = found.spec
    blocks: list[dict[str, Any]] = []
    for block in range(spec.num_blocks):
        progress = found.progress(block)
        low, high = spec.diffusion_blocks.noise.band(block)
        blocks.append({
            "block": block, "group": group_of_block(spec, block), "step": progress.step, "loss": progress.loss,
            "layers": list(spec.layers_of(block)), "sigma": [low, high], "skipped": list(progress.skipped),
            "micro_batches": [list(entry) for entry in progress.micro_batches],
        })  # fmt: skip
    steps = [row["step"] for row in blocks]
    complete = all(step >= spec.train.steps for step in steps)
    value = {
        "session": str(session), "status": "complete" if complete else "partial", "step": min(steps),
        "steps": spec.train.steps, "blocks": blocks, "digest": found.store.digest(),
    }  # fmt: skip

    def text() -> str:
        rows = []
        for row in blocks:
            low, high = row["sigma"]
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            rows.append(
                f"block {row['block']}  step {row['step']}/{spec.train.steps}  sigma {low:.4g}..{high:.4g}  "
                f"loss {loss}  skipped {len(row['skipped'])}"
            )
        return "\n".join([*rows, f"{value['status']}  digest {value['digest']}"])

    options.emit(value, as_json, text)
