"""Blocks trained by ONNX Runtime and by torch: memory, time, and the losses after the same steps.

A ViT and a DiT of width 128 on digits and text models of width 64 on the King James Bible, batches of 8. Peaks are of
everything: planning, the gradient's graph, creation, training. How far rounding alone leads is shown by torch with half
the micro-batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import edgetrain, environment, mib, parser, progress, report, settings, temporary_folder
from language import king_james

_SIZES = {"train.batch_size": 8, "train.visit_steps": 20, "optimizer.lr": 1e-4}
_IMAGES = {"model.width": 128, "model.depth": 3}
_TEXT = {"model.width": 64, "model.depth": 4}
FAMILIES = {"vit": _IMAGES, "dit": _IMAGES, "masked": _TEXT, "ar": _TEXT, "recurrent": _TEXT}
WAYS = {"torch": ("torch", 8), "torch, micro-batches of 4": ("torch", 4), "ONNX Runtime": ("ort", 8)}

_LOSSES = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import devices
from edgetrain.blockwise import BlockTrainer
from edgetrain.cli.options import open_training_data
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Choice
from edgetrain.session import Session
from edgetrain.training_data import training_batches
session = Session.open(Path(sys.argv[1]))
_, dataset = open_training_data(session.spec, session)
objective = diffusion_blocks(session.spec, training_batches(session.spec, dataset))
trainer = BlockTrainer(session, devices.open_device("cpu", session.scratch), Choice(8, "keep", True), objective)
found = []
for block in range(session.spec.num_blocks):
    trainer.enter(block)
    found += [trainer.loss(session.progress(block), step, None) for step in range(16)]
print(json.dumps(found))
"""


def main() -> None:
    options = parser(__doc__).parse_args()
    steps = 20 if options.quick else 200
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        for family, sizes in FAMILIES.items():
            recipe = f"{family}-digits" if sizes is _IMAGES else f"{family}-text"
            data = [] if sizes is _IMAGES else ["--data", str(king_james())]
            known: list[float] = []
            for name, (backend, micro_batch) in WAYS.items():
                session = folder / f"{family}-{name}".replace(" ", "-").replace(",", "")
                budget = "400MiB" if backend == "torch" else "200MiB" if sizes is _IMAGES else "250MiB"
                changes = settings(_SIZES | sizes | {"train.micro_batch": micro_batch})
                made = edgetrain(
                    folder, "train", str(session), "--recipe", recipe, *data, "--memory-budget", budget,
                    "--threads", "1", "--steps", str(steps), "--backend", backend, *changes,
                ).require()  # fmt: skip
                final = _losses(folder, session)
                known = known or final
                apart = max(abs(one - other) for one, other in zip(final, known, strict=True))
                rows.append([
                    family, name, budget, mib(made.peak_bytes), mib(made.value["plan_peak_bytes"]),
                    f"{made.value['seconds']:.1f}", f"{made.cpu_s:.1f}", f"{apart:.1e}",
                ])  # fmt: skip
                progress(" ".join(map(str, rows[-1])))
    report(
        options.out, f"Blocks trained by two backends, batches of 8, {steps} steps a block",
        ["family", "backend", "budget", "peak MiB", "plan MiB", "seconds", "CPU seconds",
         "largest difference of a loss"],
        rows,
        "losses: of all blocks after training, on 16 batches, by torch, against the family's first row; seconds with "
        "planning",
    )  # fmt: skip


def _losses(folder: Path, session: Path) -> list[float]:
    """Of each block in its last state, on 16 batches."""
    command = [sys.executable, "-c", _LOSSES, str(session)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(folder))
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
