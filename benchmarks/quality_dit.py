"""Garments of Fashion-MNIST, generated: blocks trained alone beside the same diffusion transformer trained as a whole.

The weighted square error of a denoised pixel at six noise levels (each level by the block that owns it), and a Frechet
distance between generated and test images, on the features of a small classifier that this script trains: not an FID.
Equal steps for each block are equal layer evaluations in training; in sampling a step runs 1 / B of the layers.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from common import edgetrain, progress, report
from quality import COLUMNS, Arm, Scores, Study, difference, quality_parser, split_train_set, where

_USUAL_FOLDER = "/usr/share/datasets/fashion-mnist"
_BASE = {"model.width": 64, "model.patch": 4, "model.neighbours": 1, "train.visit_steps": 100}
_TWO_LAYERS = {"train.objective": "exact", "model.depth": 2, "diffusion_blocks.num_blocks": 1}
_LRS = (8e-3, 1.6e-2)
_HELD_OUT = 2000
ARMS = [
    Arm("end to end, 6 layers", _BASE | {"train.objective": "exact"}, lrs=_LRS),
    Arm("end to end, 2 layers", _BASE | _TWO_LAYERS, lrs=_LRS, seeds=1),
    Arm("end to end, 2 layers, 3x steps", _BASE | _TWO_LAYERS, lrs=_LRS[1:], seeds=1, times=3),
    Arm("calibrated, B=2", _BASE | {"diffusion_blocks.num_blocks": 2}, lrs=_LRS),
    Arm("calibrated, B=3", _BASE, lrs=_LRS),
    Arm("paper, B=3", _BASE | {"model.neighbours": 0, "diffusion_blocks.preset": "paper"}, lrs=_LRS[1:], seeds=1),
]  # fmt: skip
_GAP = 2  # pixels between two images of a grid


def features(session: Path, images: Any) -> Any:
    """What a trained classifier knows of images (n, 1, 28, 28): its token after the last layer, (n, width)."""
    import numpy as np
    import torch

    import devices
    from edgetrain.data import to_float
    from edgetrain.sampling import Classifier
    from edgetrain.session import Session

    classifier = Classifier(Session.open(session), devices.open_device("cpu"), 500)
    found = []
    with torch.no_grad():
        for start in range(0, len(images), 500):
            given = {"images": torch.from_numpy(to_float(images[start : start + 500]))}
            boundary = classifier.network.enter(classifier._load(classifier.stages.stem), given)
            for unit in classifier.stages.layers:
                boundary = classifier.network.layer(classifier._load(unit), boundary)
            found.append(boundary.carried["tokens"][:, 0].numpy())
    return np.concatenate(found).astype(np.float64)


def frechet(a: Any, b: Any) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, width)."""
    import numpy as np

    covariances = [np.cov(one, rowvar=False) for one in (a, b)]
    roots = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0) ** 0.5
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


def cut(grid: Path, columns: int, size: int = 28) -> Any:
    """The images of a grid, row by row."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(grid))
    rows = (pixels.shape[0] + _GAP) // (size + _GAP)
    places = [(r * (size + _GAP), c * (size + _GAP)) for r in range(rows) for c in range(columns)]
    return np.stack([pixels[top : top + size, left : left + size] for top, left in places])[:, None]


def main() -> None:
    made = quality_parser(__doc__)
    made.add_argument("--data", type=Path, default=Path(os.environ.get("EDGETRAIN_FASHION_MNIST", _USUAL_FOLDER)))
    made.add_argument("--images", type=int, default=1000, help="how many are generated for the distance")
    options = made.parse_args()
    steps = options.steps or (20 if options.quick else 2000)
    num_images = 40 if options.quick else options.images
    seeds = range(1 if options.quick else options.seeds)
    folder = options.folder.resolve()
    choosing, testing = split_train_set(options.data, folder, _HELD_OUT)
    judge = folder / "judge"
    arguments = [] if (judge / "session.json").exists() else [
        "--recipe", "vit-fashion-mnist", "--data", str(choosing), "--memory-budget", options.memory_budget, "--set",
        "train.objective=exact", "--steps", "20" if options.quick else "2000",
    ]  # fmt: skip
    edgetrain(folder, "train", str(judge), *arguments, *where(options), timeout_s=1e5).require()

    from edgetrain.data import open_dataset

    def score(data: Path, generates: bool) -> Any:
        def scored(folder: Path, session: Path) -> Scores:
            found = edgetrain(
                folder, "evaluate", str(session), "--data", str(data), *where(options), timeout_s=1e5, poll_s=0.5
            ).require()
            rows = found.value["results"]
            scores = {f"error {row['sigma']:.2g}": row["weighted"] for row in rows}
            scores["error"] = sum(row["weighted"] for row in rows) / len(rows)
            if generates:
                import numpy as np

                grid = session.with_name(f"{session.name}.png")
                command = ["generate", str(session), "--to", str(grid), "--count", str(num_images), "--guidance", "2"]
                edgetrain(folder, *command, *where(options), timeout_s=1e5, poll_s=0.5).require()
                real, _ = open_dataset(str(data), "test", folder).read(np.arange(num_images))
                scores["frechet"] = frechet(features(judge, cut(grid, 10)), features(judge, real))
            return scores

        return scored

    study = Study(options, "dit-fashion-mnist", choosing, steps, chosen_by=("error",), maximise=False)
    study.run(ARMS, seeds, score(choosing, False), score(testing, True))
    levels = [name for name in study.at(ARMS[0], "test")[0].scores if name.startswith("error ")]
    notes = []
    for arm in ARMS[1:]:
        for metric in ("error", *levels, "frechet"):
            values, whole = ([one.scores[metric] for one in study.at(which, "test")] for which in (arm, ARMS[0]))
            of_it = [100 / statistics.mean(whole) * one for one in values]
            notes.append(
                f"{arm.name}, {metric}: {difference(values, whole, 4)}, "
                f"{difference(of_it, [100 / statistics.mean(whole) * one for one in whole], 1)} per cent, "
                "against end to end with 6 layers"
            )
    progress("scored")
    report(
        options.out, f"Generating Fashion-MNIST, {steps} steps a block, {len(seeds)} seeds",
        [*COLUMNS[0], "error", *levels, "Frechet", *COLUMNS[1]],
        list(study.rows(ARMS, ["error", *levels, "frechet"], 4)), *notes,
        "error: EDM's weighted square error of a pixel, the mean of six noise levels; Frechet distance on the features "
        f"of a small classifier, {num_images} images, 50 steps, guidance 2",
    )  # fmt: skip
    if options.figure is not None:
        study.figure(ARMS, "Generating Fashion-MNIST, validation", "weighted square error", options.figure)


if __name__ == "__main__":
    main()
