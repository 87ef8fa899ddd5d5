"""Fashion-MNIST from its IDX files within 400 MiB, and the exported model's accuracy beside the session's.

Trains the recipe ``vit-fashion-mnist``, evaluates with ``edgetrain evaluate``, exports, and classifies the same test
set with onnxruntime (``edgetrain predict``, in which torch is not imported). To show: equal to 0.1 points.
"""

from __future__ import annotations

import os
from pathlib import Path

from common import edgetrain, mib, parser, progress, report, temporary_folder

_BUDGET = "400MiB"
_USUAL_FOLDER = "/usr/share/datasets/fashion-mnist"
# The readouts of `evaluate` that `predict` knows too, by its options.
_READOUTS = {
    ("--draws", "1"): {"chain": "chain", "sigma_max": "sigma_max"},
    (): {"chain-mode": "chain-mode", "sigma_max-mode": "sigma_max-mode"},
    ("--draws", "8"): {"chain": "chain-mean8", "sigma_max": "sigma_max-mean8"},
    ("--projection", "hard", "--draws", "1"): {"chain": "chain-hard"},
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, default=Path(os.environ.get("EDGETRAIN_FASHION_MNIST", _USUAL_FOLDER)))
    made.add_argument("--steps", type=int, help="optimizer steps per block, instead of the recipe's")
    made.add_argument("--threads", type=int, default=2)
    options = made.parse_args()
    steps = options.steps or (30 if options.quick else None)
    threads = ["--threads", str(options.threads)]
    data = str(options.data.resolve())
    rows: list[list[object]] = []
    peaks: dict[str, int] = {}
    with temporary_folder() as folder:
        command = ["train", "session", "--recipe", "vit-fashion-mnist", "--memory-budget", _BUDGET, "--data", data]
        command += ["--steps", str(steps)] if steps else []
        trained = edgetrain(folder, *command, *threads, timeout_s=12 * 3600).require()
        progress(f"trained {trained.value['step']} steps per block in {trained.seconds:.0f} s")
        evaluated = edgetrain(folder, "evaluate", "session", *threads).require()
        here = {row["readout"]: row["value"] for row in evaluated.value["results"]}
        progress(f"evaluated in {evaluated.seconds:.0f} s: {here}")
        exported = edgetrain(folder, "export", "session", "--to", "model").require()
        peaks |= {"train": trained.peak_bytes, "evaluate": evaluated.peak_bytes, "export": exported.peak_bytes}
        for arguments, names in list(_READOUTS.items())[: 1 if options.quick else None]:
            predicted = edgetrain(folder, "predict", "model", "--data", data, *arguments, *threads).require()
            peaks["predict"] = max(peaks.get("predict", 0), predicted.peak_bytes)
            there = {row["readout"]: row["value"] for row in predicted.value["results"]}
            for name, readout in names.items():
                difference = abs(there[name] - here[readout])
                rows.append([readout, f"{here[readout]:.2f}", f"{there[name]:.2f}", f"{difference:.2f}"])
            progress(f"predicted in {predicted.seconds:.0f} s: {rows[-1]}")
    report(
        options.out, f"Fashion-MNIST, {trained.value['step']} steps per block, {trained.seconds / 60:.1f} min",
        ["readout", "evaluate %", "onnxruntime %", "difference"], rows,
        *(f"peak of {name}: {mib(peak)} MiB" for name, peak in peaks.items()),
        f"budget {_BUDGET}; training alone, without the probe before it: {mib(trained.value['peak_bytes'])} MiB, "
        f"planned {mib(trained.value['plan_peak_bytes'])} MiB",
    )  # fmt: skip


if __name__ == "__main__":
    main()
