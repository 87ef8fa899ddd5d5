"""The next character of the King James Bible: blocks trained alone beside the same transformer trained as a whole.

End to end with L = 8 layers, and with the 2 that one of B = 4 blocks has, at the same steps and at four times as many;
DiffusionBlocks by the preset "paper", by "calibrated" with the auxiliary cross-entropy on the clean stream, and
without it. At sigma_max, where the noisy token carries nothing, the readout is a true negative log-likelihood; by the
chain it is a bound on one, also over the mean of eight noise draws.
"""

from __future__ import annotations

from common import report
from language import king_james
from quality import Arm, Study, difference, quality_parser, split_text, text_scores

_BASE = {"model.width": 64, "train.batch_size": 16, "train.visit_steps": 10}
_EXACT = _BASE | {"train.objective": "exact", "diffusion_blocks.auxiliary": 0.0}
_TWO = _EXACT | {"model.depth": 2, "diffusion_blocks.num_blocks": 1}
_LRS = (3e-3,)
ARMS = [
    Arm("end to end, 8 layers", _EXACT, lrs=_LRS),
    Arm("end to end, 2 layers", _TWO, lrs=_LRS),
    Arm("end to end, 2 layers, 4x steps", _TWO, times=4, lrs=_LRS),
    Arm("paper, B=4", _BASE | {"diffusion_blocks.preset": "paper", "diffusion_blocks.auxiliary": 0.0,
                               "model.previous": "false"}, lrs=_LRS),
    Arm("calibrated, B=4", _BASE, lrs=_LRS),
    Arm("calibrated, B=4, no auxiliary", _BASE | {"diffusion_blocks.auxiliary": 0.0}, lrs=_LRS, seeds=1),
    Arm("calibrated, B=4, no previous token", _BASE | {"model.previous": "false"}, lrs=_LRS, seeds=1),
]  # fmt: skip
_READOUTS = ("sigma_max", "chain", "chain-mean8")


def main() -> None:
    options = quality_parser(__doc__).parse_args()
    steps = options.steps or (20 if options.quick else 1000)
    seeds = range(1 if options.quick else options.seeds)
    fit, test = split_text(king_james(), options.folder.resolve())
    study = Study(
        options.folder, "ar-text", fit, steps, "1GiB", options.threads, best="", maximise=False
    )  # fmt: skip
    validate = text_scores(None, options.threads, "--limit", "128", "--draws", "1")
    study.run(ARMS, seeds, validate, text_scores(test, options.threads, "--limit", "512", "--draws", "8"))
    whole = [one.scores["whole"] for one in study.at(ARMS[0], "test")]
    small = [one.scores["whole"] for one in study.at(ARMS[1], "test")]
    notes = []
    for arm in ARMS[3:]:
        for readout in _READOUTS:
            values = [one.scores[readout] for one in study.at(arm, "test")]
            notes.append(
                f"{arm.name}, {readout}: {difference(values, whole, 3)} bits against end to end with 8 layers, "
                f"{difference(values, small, 3)} against 2 layers"
            )
    report(
        options.out, f"Next character, King James, {steps} steps a block, {len(seeds)} seeds: bits a character",
        ["arm", "lr", "steps", "validation at 1/4, 1/2, 1", "whole model", *_READOUTS, "training s"],
        list(study.rows(ARMS, ["whole", *_READOUTS], 3)), *notes,
    )  # fmt: skip
    if options.figure is not None:
        study.figure(ARMS, "Next character, King James, validation", "bits a character, best readout", options.figure)


if __name__ == "__main__":
    main()
