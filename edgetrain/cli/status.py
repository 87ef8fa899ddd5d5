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
    """Show how far SESSION is, or each block of it. Instant: it reads manifests alone.

    \b
    Example:
      edgetrain status my-session --json
    """
    from edgetrain.noise import masking_band
    from edgetrain.session import Session
    from edgetrain.stages import group_of_block

    found = Session.open(session)
    spec = found.spec
    blocks: list[dict[str, Any]] = []
    for block in range(spec.num_blocks):
        progress = found.progress(block)
        row = {
            "block": block, "group": group_of_block(spec, block), "step": progress.step, "loss": progress.loss,
            "layers": list(spec.layers_of(block)), "skipped": list(progress.skipped),
            "micro_batches": [list(entry) for entry in progress.micro_batches],
        }  # fmt: skip
        if spec.model.family == "masked" and not spec.is_exact:
            row["t"] = list(masking_band(spec.num_blocks, block))
        elif not spec.is_exact:
            row["sigma"] = list(spec.diffusion_blocks.noise.band(block))
        blocks.append(row)
    steps = [row["step"] for row in blocks]
    complete = all(step >= spec.train.steps for step in steps)
    value = {
        "session": str(session), "status": "complete" if complete else "partial", "step": min(steps),
        "steps": spec.train.steps, "objective": spec.train.objective, "blocks": blocks,
        "trained_parameters": sum(layout.num_elements for layout in found.store.trained_layouts),
        "frozen_parameters": sum(layout.num_elements for layout in found.store.frozen_layouts),
        "digest": found.store.digest(),
    }  # fmt: skip

    def text() -> str:
        rows = []
        for row in blocks:
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            step, ended = f"step {row['step']}/{spec.train.steps}", f"loss {loss}  skipped {len(row['skipped'])}"
            if spec.is_exact:
                counts = (f"{value[f'{which}_parameters'] / 1e6:.1f} M {which}" for which in ("trained", "frozen"))
                rows.append("  ".join([step, ended, *counts]))
            else:
                noise = "t" if "t" in row else "sigma"
                low, high = row[noise]
                rows.append(f"block {row['block']}  {step}  {noise} {low:.4g}..{high:.4g}  {ended}")
        return "\n".join([*rows, f"{value['status']}  digest {value['digest']}"])

    options.emit(value, as_json, text)
