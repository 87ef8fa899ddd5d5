"""Blocks of a classifier trained by ONNX Runtime and by torch: memory, time, and the losses after 200 steps.

A ViT of width 128, batches of 8. Peaks are of everything: planning, the gradient's graph, creation, training. How far
rounding alone leads is shown by torch with half the micro-batch.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import edgetrain, mib, parser, report, settings, temporary_folder

_SIZES = {"model.width": 128, "model.depth": 3, "train.batch_size": 8, "train.visit_steps": 20, "optimizer.lr": 1e-4}


def main() -> None:
    options = parser(__doc__).parse_args()
    steps = 20 if options.quick else 200
    ways = {
        "torch": (["--backend", "torch"], 8, "400MiB"),
        "torch, micro-batches of 4": (["--backend", "torch"], 4, "400MiB"),
        "ONNX Runtime": (["--backend", "ort"], 8, "200MiB"),
    }
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        known: dict[tuple[int, int], float] = {}
        for name, (more, micro_batch, budget) in ways.items():
            session = folder / name.replace(" ", "-").replace(",", "")
            changes = settings(_SIZES | {"train.micro_batch": micro_batch})
            made = edgetrain(
                folder, "train", str(session), "--recipe", "vit-digits", "--memory-budget", budget, "--threads", "1",
                "--steps", str(steps), *changes, *more,
            ).require()  # fmt: skip
            final = _losses(folder, session)
            known = known or final
            rows.append([
                name, budget, mib(made.peak_bytes), mib(made.value["plan_peak_bytes"]),
                f"{made.value['seconds']:.1f}", f"{made.cpu_s:.1f}",
                f"{max(abs(final[at] - known[at]) for at in known):.1e}",
            ])  # fmt: skip
    report(
        options.out, f"A ViT of width 128 on digits, batches of 8, {steps} steps a block",
        ["backend", "budget", "peak MiB", "plan MiB", "seconds", "CPU seconds", "largest difference of a loss"],
        rows,
        "losses: of all blocks after training, on 16 batches, by torch, against the first row; seconds with planning",
    )  # fmt: skip


def _losses(folder: Path, session: Path) -> dict[tuple[int, int], float]:
    """Of each block in its last state, for the steps that would come next."""
    import subprocess
    import sys

    code = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import devices
from edgetrain.blockwise import BlockTrainer
from edgetrain.data import open_dataset
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Choice
from edgetrain.session import Session
from edgetrain.training_data import training_batches
session = Session.open(Path(sys.argv[1]))
batches = training_batches(session.spec, open_dataset("digits", "train", session.path))
device = devices.open_device("cpu", session.scratch)
trainer = BlockTrainer(session, device, Choice(8, "keep", True), diffusion_blocks(session.spec, batches))
found = []
for block in range(session.spec.num_blocks):
    trainer.enter(block)
    for step in range(16):
        found.append([block, step, trainer.loss(session.progress(block), step, None)])
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code, str(session)], check=True, capture_output=True, text=True)
    return {(block, step): loss for block, step, loss in json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    main()
