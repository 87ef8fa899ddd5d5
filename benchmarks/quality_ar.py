"""The next character of the King James Bible: blocks trained alone beside the same transformer trained as a whole.

End to end with L = 8 layers, and with the 2 that one of B = 4 blocks has, at the same steps and at four times as many;
DiffusionBlocks by both presets. At sigma_max, where the noisy token carries nothing, the readout is a true
negative log-likelihood; by the chain of all blocks it is a variational bound on one. What the arms write is read by the
first of them, and counted for how various it is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from common import report
from language import king_james
from quality import COLUMNS, Arm, Score, Scores, Study, difference, quality_parser, split_text, text_scores, where
from written import TOKENS, judged, openings

_BASE = {"model.width": 64, "train.batch_size": 16, "train.visit_steps": 10}
_EXACT = _BASE | {"train.objective": "exact"}
_TWO = _EXACT | {"model.depth": 2, "diffusion_blocks.num_blocks": 1}
_LRS = (3e-3,)
ARMS = [
    Arm("end to end, 8 layers", _EXACT, lrs=_LRS),
    Arm("end to end, 2 layers", _TWO, lrs=_LRS),
    Arm("end to end, 2 layers, 4x steps", _TWO, times=4, lrs=_LRS, seeds=1),
    Arm("paper, B=4", _BASE | {"diffusion_blocks.preset": "paper", "model.previous": "false"}, lrs=_LRS, seeds=1),
    Arm("calibrated, B=4", _BASE, lrs=_LRS),
]  # fmt: skip
_READOUTS = ("sigma_max", "chain")
_JUDGED = ("judged", "distinct-2", "chain judged", "chain distinct-2")
_WRITTEN = 24


def main() -> None:
    options = quality_parser(__doc__).parse_args()
    steps = options.steps or (20 if options.quick else 800)
    seeds = range(1 if options.quick else options.seeds)
    fit, test = split_text(king_james(), options.folder.resolve())
    study = Study(options, "ar-text", fit, steps, chosen_by=("sigma_max", "whole"), maximise=False)
    validate = text_scores(None, where(options), "--limit", "128", "--euler-steps", "1")
    prompts = openings(test, 2 if options.quick else _WRITTEN)
    judge = study.session(ARMS[0], 0, 1.0, _LRS[0])

    def scored(folder: Path, session: Path, score: Score) -> Scores:
        """Also what the arm writes, by one step at sigma_max and, of blocks, by one step for each."""
        found = score(folder, session)
        for name, steps in {"": 1, "chain ": 16}.items() if "chain" in found else {"": 1}.items():
            found |= {name + metric: value for metric, value in judged(session, judge, prompts, steps).items()}
        return found

    measured = text_scores(test, where(options), "--limit", "256")
    study.run(ARMS, seeds, validate, partial(scored, score=measured))
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
        [*COLUMNS[0], "whole model", *_READOUTS, *_JUDGED, *COLUMNS[1]],
        list(study.rows(ARMS, ["whole", *_READOUTS, *_JUDGED], 3)), *notes,
        f"judged: bits a character by the first arm (seed 0) of {len(prompts)} texts of {TOKENS} characters; "
        "distinct-2: per cent of their pairs of words that are different ones; chain: written by 16 Euler steps; "
        "of the real text: "
        + ", ".join(f"{name} {value:.2f}" for name, value in judged(None, judge, prompts, 1).items()),
    )  # fmt: skip
    if options.figure is not None:
        study.figure(ARMS, "Next character, King James, validation", "bits a character", options.figure)


if __name__ == "__main__":
    main()
