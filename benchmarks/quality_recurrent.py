"""A recurrent-depth model of the characters of the King James Bible: one run of the core a step, or back through loops.

DiffusionBlocks trains the core by single steps of denoising; end to end it runs 16 times, and gradients flow back
through the last 8 (truncated backpropagation through time). Equal wall time: the second gets as many steps as take the
same seconds, measured in the same run. Then bits a character against the number of runs of the core.
"""

from __future__ import annotations

from common import progress, report
from language import king_james
from quality import Arm, Study, quality_parser, split_text, spread, text_scores, where

_BASE = {"model.width": 64, "model.depth": 2, "model.loops": 16, "train.batch_size": 16, "train.visit_steps": 20}
_THROUGH_TIME = _BASE | {"train.objective": "exact", "model.backprop_loops": 8}
_LRS = (3e-3, 6e-3, 1.2e-2)
_RUNS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    options = quality_parser(__doc__).parse_args()
    steps = options.steps or (20 if options.quick else 1200)
    seeds = range(1 if options.quick else options.seeds)
    folder = options.folder.resolve()
    fit, test = split_text(king_james(), folder)
    readouts = ("sigma_max, 1 runs", "whole, 16 runs")
    study = Study(options, "recurrent-text", fit, steps, chosen_by=readouts, maximise=False)
    validate = text_scores(None, where(options), "--limit", "64")
    tested = text_scores(test, where(options), "--limit", "256")
    single = Arm("DiffusionBlocks, one run", _BASE, lrs=_LRS)
    quarter = Arm("truncated BPTT, a quarter of the steps", _THROUGH_TIME, times=0.25, lrs=_LRS, seeds=1)
    paper = Arm("DiffusionBlocks, one run, paper", _BASE | {"diffusion_blocks.preset": "paper"}, lrs=_LRS, seeds=1)
    study.run([single, quarter], seeds, validate, tested)
    ratio = study.cpu_s_a_step(quarter) / study.cpu_s_a_step(single)
    progress(f"a step through time: {ratio:.2f} times the CPU seconds of one of a single run")
    equal = Arm("truncated BPTT, equal time", _THROUGH_TIME, times=1 / ratio, lrs=_LRS)
    arms = [single, paper, equal, quarter]
    study.run(arms, seeds, validate, tested)
    rows: list[list[object]] = []
    for arm in arms:
        results = study.at(arm, "test")
        cost = study.cpu_s_a_step(arm)
        columns = []
        for runs in _RUNS:
            names = [f"{kind}, {runs} runs" for kind in ("sigma_max", "chain", "whole")]
            firsts = (next((one.scores[n] for n in names if n in one.scores), None) for one in results)
            columns.append(spread([one for one in firsts if one is not None], 3))
        num_steps = results[0].steps
        rows.append([arm.name, num_steps, f"{cost * num_steps:.0f}", f"{cost:.3f}", *columns])
    report(
        options.out, f"Recurrent depth, King James, {len(seeds)} seeds: bits a character by runs of the core",
        ["arm", "steps", "CPU s", "CPU s a step", *map(str, _RUNS)], rows,
        f"a step through time takes {ratio:.1f} times the CPU seconds of one of a single run, over whole trainings",
        "of DiffusionBlocks, variational bounds of a chain of so many steps, which tighten with many; of one run the "
        "likelihood at sigma_max",
    )  # fmt: skip
    if options.figure is not None:
        label = "bits a character, 1 run of blocks, 16 else"
        study.figure(arms, "Recurrent depth, King James, validation", label, options.figure)


if __name__ == "__main__":
    main()
