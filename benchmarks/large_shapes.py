"""Models whose training state is many times the budget: random weights in the shapes of Qwen2.5-0.5B and Llama-3.2-1B,
all parameters, exact AdamW in fp32, 512 tokens, two steps within each budget, one after the other in the same session;
within the smaller one the matrices come in tiles. The 1B needs some 35 GB of disk."""

from __future__ import annotations

import json
import shutil

from common import edgetrain, mib, parser, progress, report, settings, temporary_folder
from language import LLAMA_1B, QWEN2_HALF_B, king_james, random_llama

_CASES = {
    "Qwen2.5-0.5B": (QWEN2_HALF_B, ["560MiB", "400MiB"]),
    "Llama-3.2-1B": (LLAMA_1B, ["1100MiB", "560MiB"]),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=list(_CASES))
    told = arguments.parse_args()
    rows = []
    for name, (config, budgets) in _CASES.items():
        if told.only not in (None, name):
            continue
        with temporary_folder() as home:
            shape = config | ({"num_hidden_layers": 2} if told.quick else {})
            folder, session = random_llama(home / "model", **shape), home / "session"
            changes = {
                "data.length": 512,
                "train.batch_size": 1,
                "train.steps": 2 * len(budgets),
                "train.visit_steps": 2,
            }
            words = ["--data", str(king_james()), *settings(changes)]
            imported = edgetrain(home, "import", str(folder), str(session), *words).require()
            shutil.rmtree(folder)
            progress(f"{name}: imported in {imported.seconds:.0f} s, peak {mib(imported.peak_bytes)} MiB")
            state = 16 * imported.value["trained_parameters"]
            for budget in budgets:
                told_so = ["--memory-budget", budget, "--threads", "2", "--visits", "1"]
                done = edgetrain(home, "train", str(session), *told_so).require()
                value = done.value
                choice = json.loads((session / "plan.json").read_text())["choice"]
                rows.append([
                    name, f"{imported.value['trained_parameters'] / 1e6:.0f} M", mib(state), budget,
                    "yes" if choice["tiled"] else "no", mib(value["plan_peak_bytes"]), mib(done.peak_bytes),
                    f"{value['plan_peak_bytes'] / value['peak_bytes']:.3f}", f"{value['loss']:.3f}",
                    f"{value['seconds']:.0f}",
                ])  # fmt: skip
                progress(str(rows[-1]))
    columns = ["shape", "parameters", "weights, gradients, moments MiB", "budget", "in tiles", "plan MiB",
               "measured MiB", "plan / measured", "loss", "seconds of 2 steps"]  # fmt: skip
    report(told.out, "State many times the budget (`large_shapes.py`)", columns, rows)


if __name__ == "__main__":
    main()
