"""A recurrent-depth model of the characters of the King James Bible: one run of the core a step, or back through loops.

DiffusionBlocks trains the core by single steps of denoising; end to end it runs 16 times, and gradients flow back
through the last 8 (truncated backpropagation through time). Equal wall time: the second gets as many steps as take the
same seconds, measured in the same run. Then bits a character against the number of runs of the core.
"""

from __future__ import annotations

import json

from common import edgetrain, progress, report, settings
from language import king_james
from quality import Arm, Study, quality_parser, split_text, spread, text_scores

_BASE = {"model.width": 64, "model.depth": 2, "model.loops": 16, "train.batch_size": 16, "train.visit_steps": 20}
_THROUGH_TIME = _BASE | {"train.objective": "exact", "model.backprop_loops": 8}
_LRS = (3e-3,)
_RUNS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    options = quality_parser(__doc__).parse_args()
    steps = options.steps or (20 if options.quick else 3000)
    seeds = range(1 if options.quick else options.seeds)
    folder = options.folder.resolve()
    fit, test = split_text(king_james(), folder)
    costs = {}
    for name, changes in (("single", _BASE), ("through time", _THROUGH_TIME)):
        few = 5 if options.quick else 20
        session = folder / f"timed-{name.replace(' ', '-')}"
        arguments = [] if (session / "session.json").exists() else [
            "--recipe", "recurrent-text", "--data", str(fit), "--memory-budget", "1GiB", "--steps", str(few),
            *settings(changes),
        ]  # fmt: skip
        edgetrain(folder, "train", str(session), *arguments, "--threads", str(options.threads)).require()
        last = json.loads((session / "metrics.jsonl").read_text().splitlines()[-1])
        costs[name] = 16 * 128 / last["tokens_per_s"]
        progress(f"{name}: {costs[name]:.3f} s a step")
    ratio = costs["through time"] / costs["single"]
    arms = [
        Arm("DiffusionBlocks, one run", _BASE, lrs=_LRS),
        Arm("DiffusionBlocks, one run, paper", _BASE | {"diffusion_blocks.preset": "paper"}, lrs=_LRS, seeds=1),
        Arm("truncated BPTT, equal wall time", _THROUGH_TIME, times=1 / ratio, lrs=_LRS),
        Arm("truncated BPTT, a quarter of the steps", _THROUGH_TIME, times=0.25, lrs=_LRS, seeds=1),
    ]
    study = Study(
        folder, "recurrent-text", fit, steps, "1GiB", options.threads, best="", maximise=False
    )  # fmt: skip
    validate = text_scores(None, options.threads, "--limit", "64")
    study.run(arms, seeds, validate, text_scores(test, options.threads, "--limit", "256"))
    rows: list[list[object]] = []
    for arm in arms:
        tested = study.at(arm, "test")
        seconds = sum(one.seconds for one in study.at(arm, "validation")) / len(tested)
        columns = []
        for runs in _RUNS:
            names = [f"{kind}, {runs} runs" for kind in ("chain", "whole")]
            columns.append(spread([one.scores[n] for one in tested for n in names if n in one.scores], 3))
        rows.append([arm.name, tested[0].steps, f"{seconds:.0f}", f"{seconds / tested[0].steps:.3f}", *columns])
    report(
        options.out, f"Recurrent depth, King James, {len(seeds)} seeds: bits a character by runs of the core",
        ["arm", "steps", "training s", "s a step", *map(str, _RUNS)], rows,
        f"a step through time takes {ratio:.1f} times as long as one of a single run (measured in this run)",
        "of DiffusionBlocks, variational bounds of a chain of so many steps, which tighten with many; that of "
        "one run is the likelihood at sigma_max, but for some thousandths that the start costs",
    )  # fmt: skip
    if options.figure is not None:
        study.figure(arms, "Recurrent depth, King James, validation", "bits a character, best readout", options.figure)


if __name__ == "__main__":
    main()
