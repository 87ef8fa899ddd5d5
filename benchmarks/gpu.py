"""Training on a GPU within budgets of its memory: planned and measured peaks, and tokens a second beside plain torch.

A model of the next byte, trained exactly as a whole and in blocks. Plain torch has the same modules, all of it in the
GPU's memory, torch's fused AdamW and the whole batch at once. Budgets and peaks are the GPU's memory as its driver sees
it, the context included. Sessions are created side by side; what is timed runs alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Outcome, edgetrain, mib, parser, progress, report, settings, temporary_folder, write_text

_STEPS = 5
_SIZE = {
    "model.width": 1024, "model.depth": 12, "model.heads": 16, "data.length": 512, "train.batch_size": 8,
    "train.visit_steps": _STEPS,
}  # fmt: skip
_SMALL = {**_SIZE, "model.width": 256, "model.depth": 4}
_EXACT = {"train.objective": "exact", "diffusion_blocks.num_blocks": 1}
_BLOCKS = {"diffusion_blocks.num_blocks": 4}
_ARMS = [(_EXACT, "10GiB"), (_EXACT, "3GiB"), (_EXACT, "2GiB"), (_BLOCKS, "10GiB"), (_BLOCKS, "2GiB")]


def plain(spec_file: Path, steps: int) -> None:
    """The arm without edgetrain's trainer, in a process of its own: prints tokens a second and its peak."""
    import tomllib

    import numpy as np
    import torch
    from torch import nn

    import devices
    from edgetrain.models import build_network
    from edgetrain.recipe import resolve
    from edgetrain.stages import exact_stages
    from edgetrain.training_data import training_batches

    spec = resolve(tomllib.loads(spec_file.read_text()))
    length = spec.text.length

    class Tokens:
        num_examples = 1 << 16

        def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tokens = (indices[:, None] * 7 + np.arange(length + 1)) % 97
            return tokens[:, :-1], tokens[:, 1:], np.ones((len(indices), length), np.float32)

    device = devices.open_device("cuda")
    network, stages = build_network(spec, training_batches(spec, Tokens())), exact_stages(spec)
    units = [stages.stem, *stages.layers, stages.head]
    with torch.device(device.torch_device):
        modules = nn.ModuleList(network.build(unit.kind) for unit in units)
    for parameter in modules.parameters():
        nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-4, fused=True)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        drawn = network.draw(step, 0, spec.train.batch_size)
        batch = {name: torch.from_numpy(array).to(device.torch_device) for name, array in drawn.items()}
        boundary = network.enter(modules[0], batch)
        for module in modules[1:-1]:
            boundary = boundary.advance(network.layer(module, boundary).carried)
        network.head(modules[-1], boundary, batch).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        device.synchronize()
        seconds.append(time.perf_counter() - began)
    tokens = spec.train.batch_size * length
    print(json.dumps({"tokens_per_s": tokens / statistics.median(seconds), "peak_bytes": device.memory.peak_bytes()}))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda")
    options = made.parse_args()
    where = ["--threads", "2", "--device", options.device]
    size = _SMALL if options.quick else _SIZE
    rows: list[list[object]] = []
    with temporary_folder() as folder:
        text = write_text(folder / "text.txt")

        def create(number: int) -> Outcome:
            changes, budget = _ARMS[number]
            given = {**size, **changes, "train.steps": 4 * _STEPS}
            home = folder / str(number)
            home.mkdir()
            told = ["--recipe", "ar-text", "--data", str(text), "--memory-budget", budget, *settings(given)]
            return edgetrain(home, "train", "session", *told, *where, "--visits", "1", poll_s=0.5).require()

        with ThreadPoolExecutor(len(_ARMS)) as pool:
            list(pool.map(create, range(len(_ARMS))))
        progress("created")
        spec = folder / "0" / "session" / "spec.toml"
        fastest = 0.0
        if options.device == "cuda":
            import subprocess

            command = [sys.executable, __file__, "plain", str(spec), str(3 * _STEPS)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            fastest = found["tokens_per_s"]
            rows.append(["plain torch", "", mib(found["peak_bytes"]), "", "all resident", f"{fastest:.0f}", "1.00"])
        for number, (changes, budget) in enumerate(_ARMS):
            home, began = folder / str(number), time.time()
            visits = ["--visits", "2" if changes is _EXACT else "4"]
            value = edgetrain(home, "train", "session", *where, *visits, poll_s=0.5).require().value
            lines = map(json.loads, (home / "session" / "metrics.jsonl").read_text().splitlines())
            rate = statistics.median(line["tokens_per_s"] for line in lines if line["time"] > began)
            plan = json.loads((home / "session" / "plan.json").read_text())
            chosen = plan["choice"]
            how = f"{value['activations']}, micro-batch {value['micro_batch']}, "
            how += "resident" if chosen.get("resident", chosen.get("moments_resident")) else "streamed"
            of_plain = f"{rate / fastest:.2f}" if changes is _EXACT and fastest else ""
            rows.append([
                "exact" if changes is _EXACT else "4 blocks", budget, mib(value["peak_bytes"]),
                mib(value["plan_peak_bytes"]), how, f"{rate:.0f}", of_plain,
            ])  # fmt: skip
            progress(str(rows[-1]))
    report(
        options.out, f"On a GPU: {size['model.depth']} layers of width {size['model.width']}, batch 8 of 512 bytes",
        ["trained", "budget", "peak MiB", "planned MiB", "how", "tokens a second", "of plain torch"], rows,
        "of blocks, the tokens of one block of three layers a second: there are four",
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        plain(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
