"""What each part of the calibrated preset is worth: one block alone, each time with one part changed.

Blocks that share nothing are trained one by one, so one is trained alone here, in a model of which the other blocks
stay as they began. Block 0 of a language model and of a classifier, which at sigma_max answers alone: bits a character
of the King James Bible, top-1 on Fashion-MNIST (beside them the transformer of as many layers trained as a whole). Of a
generator the block of the lower half of the noise levels, where blocks find it hardest to keep up: its weighted square
error, the mean of three levels of Fashion-MNIST (beside it the whole model, of twice as many layers). On the validation
split, the same steps and seeds for all.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import edgetrain, progress, report, settings
from language import king_james
from quality import identity, quality_parser, split_text, split_train_set, spread, where

_USUAL_FOLDER = "/usr/share/datasets/fashion-mnist"
_PAPERS_LEVELS = {
    "diffusion_blocks.sigma_min": 0.002, "diffusion_blocks.sigma_max": 80.0, "diffusion_blocks.p_mean": -1.2,
}  # fmt: skip
_WHOLE = {"train.objective": "exact"}
_NO_CHAIN = ("--euler-steps", "1")
Changes = Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """``block`` is the one that is trained; ``how`` it is evaluated, and with ``chain`` a model in blocks."""

    recipe: str
    arms: Mapping[str, Changes]
    base: Changes
    block: int
    metric: str
    data: Callable[[], Path]
    how: Sequence[str] = ()
    chain: Sequence[str] = ()


_TEXT = {"model.width": 64, "train.batch_size": 16, "train.visit_steps": 200, "optimizer.lr": 3e-3}
TEXT: dict[str, Changes] = {
    "2 layers as a whole": _WHOLE | {"model.depth": 2, "diffusion_blocks.num_blocks": 1},
    "calibrated": {},
    "z scaled by c_in, as the paper does": {
        "diffusion_blocks.preconditioning": "edm", "diffusion_blocks.skip": "false",
    },
    "the same, and D = c_skip z + c_out F": {"diffusion_blocks.preconditioning": "edm"},
    "no log-likelihoods added": {"diffusion_blocks.skip": "false"},
    "noisy tokens read alone": {"diffusion_blocks.joined": "false"},
    "no previous token": {"model.previous": "false"},
    "neither": {"diffusion_blocks.joined": "false", "model.previous": "false"},
    "auxiliary cross-entropy": {"diffusion_blocks.auxiliary": 1.0},
    "one stream": {"diffusion_blocks.streams": 1},
    "the paper's noise levels": _PAPERS_LEVELS,
    "sigma from .1 to 10, P_mean -.5, P_std .8": {
        "diffusion_blocks.sigma_max": 10.0, "diffusion_blocks.p_mean": -0.5, "diffusion_blocks.p_std": 0.8,
    },
    "gates start at 0": {"diffusion_blocks.gate": 0.0},
    "a stem that stays as it began": {"diffusion_blocks.stem": "frozen"},
    "z scaled by c_in of sigma_data .5": {
        "diffusion_blocks.preconditioning": "edm", "diffusion_blocks.skip": "false", "diffusion_blocks.sigma_data": 0.5,
    },
}  # fmt: skip
_IMAGES = {"train.visit_steps": 500, "optimizer.lr": 2e-3}
IMAGES: dict[str, Changes] = {
    "2 layers as a whole": _WHOLE | {"model.depth": 2, "diffusion_blocks.num_blocks": 1},
    "calibrated": {},
    "z scaled by c_in, as the paper does": {"diffusion_blocks.preconditioning": "edm"},
    "the same, and D = c_skip z + c_out F": {
        "diffusion_blocks.preconditioning": "edm",
        "diffusion_blocks.skip": "true",
    },
    "log-likelihoods added": {"diffusion_blocks.skip": "true"},
    "auxiliary cross-entropy": {"diffusion_blocks.auxiliary": 1.0},
    "one stream": {"diffusion_blocks.streams": 1},
    "the paper's noise levels": _PAPERS_LEVELS,
    "gates start at 0": {"diffusion_blocks.gate": 0.0},
    "a stem that stays as it began": {"diffusion_blocks.stem": "frozen"},
    "z scaled by c_in of sigma_data .5": {
        "diffusion_blocks.preconditioning": "edm", "diffusion_blocks.sigma_data": 0.5,
    },
}  # fmt: skip
_GENERATOR = {
    "model.width": 64, "model.neighbours": 1, "diffusion_blocks.num_blocks": 2, "train.visit_steps": 500,
    "optimizer.lr": 1.6e-2,
}  # fmt: skip
GENERATOR: dict[str, Changes] = {
    "6 layers as a whole": _WHOLE,
    "calibrated": {},
    "errors not weighed by what is expected": {"diffusion_blocks.uncertainty": "false"},
    "no pixels of the patches around": {"model.neighbours": 0},
    "gates start at .5": {"diffusion_blocks.gate": 0.5},
    "bands overlap by .15": {"diffusion_blocks.overlap": 0.15},
    "a stem that stays as it began": {"diffusion_blocks.stem": "frozen"},
    "learning rate 2e-3": {"optimizer.lr": 2e-3},
    "6 layers as a whole, errors not weighed": _WHOLE | {"diffusion_blocks.uncertainty": "false"},
    "6 layers as a whole, no pixels of the patches around": _WHOLE | {"model.neighbours": 0},
}


def _answer(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of block 0 at sigma_max, or of a whole model; of a generator the mean of the lower half of the levels."""
    if "sigma" in rows[0]:
        return statistics.mean(row["weighted"] for row in rows[len(rows) // 2 :])
    by_readout = {row["readout"]: row["value"] for row in rows}
    return next(by_readout[readout] for readout in ("sigma_max", "whole", "top-1") if readout in by_readout)


def main() -> None:
    made = quality_parser(__doc__)
    made.add_argument("--data", type=Path, default=Path(os.environ.get("EDGETRAIN_FASHION_MNIST", _USUAL_FOLDER)))
    made.add_argument("--only", choices=["text", "images", "generator"])
    options = made.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(1 if options.quick else options.seeds)

    def images() -> Path:
        return split_train_set(options.data, folder, 10_000)[0]

    tables = {
        "text": Table(
            "ar-text", TEXT, _TEXT, 0, "bits a character at sigma_max", lambda: split_text(king_james(), folder)[0],
            ["--limit", "256"], _NO_CHAIN,
        ),
        "images": Table(
            "vit-fashion-mnist", IMAGES, _IMAGES, 0, "top-1 in per cent at sigma_max", images,
            ["--draws", "1"], _NO_CHAIN,
        ),
        "generator": Table("dit-fashion-mnist", GENERATOR, _GENERATOR, 1, "weighted square error", images),
    }  # fmt: skip
    for name, table in tables.items():
        if options.only not in (None, name):
            continue
        data = table.data()
        steps = 10 if options.quick else options.steps or 1000
        values: dict[str, list[float]] = {}
        for arm, changes in table.arms.items():
            for seed in seeds:
                given = {**table.base, **changes, "train.seed": seed, "train.steps": steps}
                session = folder / f"{name}-{arm}-{seed}-{identity(table.recipe, given)}".replace(" ", "_")
                created = [] if (session / "session.json").exists() else [
                    "--recipe", table.recipe, "--data", str(data), "--memory-budget", options.memory_budget,
                    *settings(given),
                ]  # fmt: skip
                is_whole = "train.objective" in changes
                blocks = [] if is_whole else ["--blocks", str(table.block)]
                edgetrain(
                    folder, "train", str(session), *created, *blocks, *where(options), timeout_s=1e6, poll_s=0.5
                ).require()
                how = [*table.how, *(() if is_whole else table.chain), *where(options)]
                found = edgetrain(folder, "evaluate", str(session), *how, timeout_s=1e5, poll_s=0.5).require()
                value = _answer(found.value["results"])
                values.setdefault(arm, []).append(value)
                progress(f"{name}, {arm}, seed {seed}: {value:.3f}")
        reference = statistics.mean(values["calibrated"])
        report(
            options.out and options.out.with_name(f"{options.out.stem}-{name}.md"),
            f"Block {table.block} of {table.recipe}, {steps} steps, {len(seeds)} seeds: {table.metric}",
            ["what is changed", table.metric, "against calibrated"],
            [[arm, spread(one, 4), f"{statistics.mean(one) - reference:+.4f}"] for arm, one in values.items()],
        )


if __name__ == "__main__":
    main()
