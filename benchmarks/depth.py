"""Memory does not grow with depth: peak of the process tree at 64 layers against 8, at two layers a block.

To show: at most 2 % more. Medians of three trainings each, of two visits of three steps.
"""

from __future__ import annotations

import shutil
import statistics

from common import edgetrain, mib, parser, progress, report, settings, temporary_folder

_WIDTH = 256


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2)
    options = made.parse_args()
    peaks: dict[int, list[int]] = {8: [], 64: []}
    plans: dict[int, int] = {}
    with temporary_folder() as folder:
        for _ in range(1 if options.quick else 3):
            for depth, found in peaks.items():
                changes: dict[str, object] = {
                    "model.width": _WIDTH, "model.depth": depth, "diffusion_blocks.num_blocks": depth // 2,
                    "train.micro_batch": 32, "train.visit_steps": 3, "train.steps": 3,
                }  # fmt: skip
                common = ["--recipe", "vit-digits", "--memory-budget", "600MiB", *settings(changes)]
                common += ["--threads", str(options.threads)]
                edgetrain(folder, "plan", *common).require()  # probes, which train then need not
                done = edgetrain(folder, "train", "session", *common, "--visits", "2").require()
                shutil.rmtree(folder / "session")
                plans[depth] = done.value["plan_peak_bytes"]
                found.append(done.peak_bytes)
                progress(f"{depth} layers: {mib(found[-1])} MiB in {done.seconds:.0f} s")
    medians = {depth: statistics.median(found) for depth, found in peaks.items()}
    report(
        options.out, f"Peak memory by depth, width {_WIDTH}, two layers a block",
        ["layers", "blocks", "plan MiB", "measured MiB"],
        [[depth, depth // 2, mib(plans[depth]), mib(peak)] for depth, peak in medians.items()],
        f"64 layers over 8: {medians[64] / medians[8]:.4f} (at most 1.02)",
    )  # fmt: skip


if __name__ == "__main__":
    main()
