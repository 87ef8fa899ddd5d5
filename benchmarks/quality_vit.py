"""Classification of Fashion-MNIST: blocks trained alone beside the same transformer trained as a whole.

End to end with L layers, and with the L / B layers that one block has (at the same steps, and at B times as many);
DiffusionBlocks by both presets at B = 3, and the calibrated one at B = 2 and 6. Equal steps for each block are equal
layer evaluations. Choices are made on the last 10000 training images; the test set is read once, for what is reported.
"""

from __future__ import annotations

import os
from pathlib import Path

from common import edgetrain, report
from quality import COLUMNS, Arm, Score, Scores, Study, difference, quality_parser, split_train_set, where

_USUAL_FOLDER = "/usr/share/datasets/fashion-mnist"
_EXACT = {"train.objective": "exact"}
ARMS = [
    Arm("end to end, 6 layers", {**_EXACT}),
    Arm("end to end, 2 layers", {**_EXACT, "model.depth": 2, "diffusion_blocks.num_blocks": 1}),
    Arm("end to end, 2 layers, 3x steps", {**_EXACT, "model.depth": 2, "diffusion_blocks.num_blocks": 1}, times=3),
    Arm("paper, B=3", {"diffusion_blocks.preset": "paper"}),
    Arm("calibrated, B=3", {}),
    Arm("calibrated, B=2", {"diffusion_blocks.num_blocks": 2}, lrs=(2e-3,)),
    Arm("calibrated, B=6", {"diffusion_blocks.num_blocks": 6}, lrs=(2e-3,)),
]
_READOUTS = ("chain", "chain-mode", "chain-mean8", "chain-hard", "chain-hard-mean8", "sigma_max", "sigma_max-mode",
             "sigma_max-mean8")  # fmt: skip


def main() -> None:
    made = quality_parser(__doc__)
    made.add_argument("--data", type=Path, default=Path(os.environ.get("EDGETRAIN_FASHION_MNIST", _USUAL_FOLDER)))
    options = made.parse_args()
    steps = options.steps or (60 if options.quick else 4000)
    seeds = range(1 if options.quick else options.seeds)
    choosing, testing = split_train_set(options.data, options.folder.resolve(), 10_000)
    study = Study(options, "vit-fashion-mnist", choosing, steps, chosen_by=("chain-mode", "top-1"), maximise=True)

    def score(data: Path, draws: int) -> Score:
        def scored(folder: Path, session: Path) -> Scores:
            arguments = ["--data", str(data), "--draws", str(draws), *where(options)]
            found = edgetrain(folder, "evaluate", str(session), *arguments).require()
            return {row["readout"]: row["value"] for row in found.value["results"]}

        return scored

    study.run(ARMS, seeds, score(choosing, 1), score(testing, 8))
    whole = [one.scores["top-1"] for one in study.at(ARMS[0], "test")]
    small = [one.scores["top-1"] for one in study.at(ARMS[1], "test")]
    notes = []
    for arm in ARMS[3:]:
        tested = study.at(arm, "test")
        for readout in _READOUTS:
            values = [one.scores[readout] for one in tested]
            notes.append(
                f"{arm.name}, {readout}: {difference(values, whole, 2)} against end to end with 6 layers, "
                f"{difference(values, small, 2)} against 2 layers"
            )
    report(
        options.out, f"Fashion-MNIST, {steps} steps a block, batch 64, {len(seeds)} seeds: top-1 in per cent",
        [*COLUMNS[0], "whole model", *_READOUTS, *COLUMNS[1]],
        list(study.rows(ARMS, ["top-1", *_READOUTS])), *notes,
    )  # fmt: skip
    if options.figure is not None:
        study.figure(ARMS, "Fashion-MNIST, validation", "top-1 in per cent, blocks by chain-mode", options.figure)


if __name__ == "__main__":
    main()
