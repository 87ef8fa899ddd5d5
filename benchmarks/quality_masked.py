"""Masked diffusion on the characters of the King James Bible: blocks trained alone beside the same model as a whole.

End to end with L layers and with the L / B of one block; DiffusionBlocks at B = 3 with everything shared but the layers
("paper") and with private stems and heads ("calibrated"). All arms but "paper" give a token its neighbours in the stem
(model.neighbours), so that none has to learn pairs by its layers. Bits a character, a bound on the negative
log-likelihood that all arms share (MD4, arXiv 2406.04329). A unigram model has 4.34, a bigram model 3.32.
"""

from __future__ import annotations

from common import report
from language import king_james
from quality import COLUMNS, Arm, Study, difference, quality_parser, split_text, text_scores, where

_BASE = {"model.width": 64, "model.neighbours": 2, "train.batch_size": 16, "train.visit_steps": 20}
_EXACT = _BASE | {"train.objective": "exact"}
_PAPER = _BASE | {"model.neighbours": 0, "diffusion_blocks.preset": "paper"}
_LRS = (1e-3, 3e-3)
ARMS = [
    Arm("end to end, 6 layers", _EXACT, lrs=_LRS),
    Arm("calibrated, B=3", _BASE, lrs=_LRS),
    Arm("end to end, 2 layers", _EXACT | {"model.depth": 2, "diffusion_blocks.num_blocks": 1}, lrs=_LRS),
    Arm("paper, B=3", _PAPER, lrs=_LRS, seeds=1),
]


def main() -> None:
    options = quality_parser(__doc__).parse_args()
    steps = options.steps or (30 if options.quick else 6000)
    seeds = range(1 if options.quick else options.seeds)
    fit, test = split_text(king_james(), options.folder.resolve())
    study = Study(options, "masked-text", fit, steps, chosen_by=("elbo",), maximise=False)
    validate = text_scores(None, where(options), "--limit", "256")
    study.run(ARMS, seeds, validate, text_scores(test, where(options), "--limit", "512"))
    whole = [one.scores["elbo"] for one in study.at(ARMS[0], "test")]
    notes = [
        f"{arm.name}: {difference([one.scores['elbo'] for one in study.at(arm, 'test')], whole, 3)} bits against end "
        "to end with 6 layers"
        for arm in ARMS[1:]
    ]
    report(
        options.out, f"Masked diffusion, King James, {steps} steps a block, {len(seeds)} seeds: bits a character",
        [*COLUMNS[0], "test, at most", *COLUMNS[1]],
        list(study.rows(ARMS, ["elbo"], 3)), *notes,
    )  # fmt: skip
    if options.figure is not None:
        study.figure(ARMS, "Masked diffusion, King James, validation", "bits a character, at most", options.figure)


if __name__ == "__main__":
    main()
