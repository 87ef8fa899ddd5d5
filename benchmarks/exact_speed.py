"""Fine-tuning SmolLM2-135M: tokens a CPU second and peak memory, streamed against in memory.

Each arm is a process of its own that makes one optimizer step when told to; the arms take turns, so that what else the
machine does meets all of them. In memory: transformers' model, its own loss, torch's fused AdamW, the same micro-batch
(and all sequences at once, which is faster). A commit happens once a minute in a training: its CPU time is measured
apart and its share of a minute added to edgetrain's arms.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import edgetrain, environment, mib, parser, progress, report, settings, temporary_folder
from exact_arm import cpu_s
from language import king_james, smollm2

from devices.limits import without_block_cache

_ARM = Path(__file__).with_name("exact_arm.py")
_COMMIT_EVERY_S = 60.0

Case = tuple[str, int, Sequence[str], str]
"""Recipe, sequences a step, budgets, and what is computed in."""

CASES: dict[str, Case] = {
    "finetune-4": ("finetune", 4, ["320MiB", "1000MiB", "6GiB"], "fp32"),
    "finetune-16": ("finetune", 16, ["320MiB"], "fp32"),
    "lora-4": ("lora", 4, ["320MiB"], "fp32"),
    "finetune-4-bf16": ("finetune", 4, ["320MiB"], "bf16"),
}


def commit_s(session: Path) -> float:
    """CPU seconds of a commit: it reads and hashes what the steps have written."""
    from edgetrain.session import Session

    opened = Session.open(session)
    began = cpu_s()
    opened.store.verify()
    return cpu_s() - began


class Arm:
    def __init__(self, name: str, home: Path, *arguments: str) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0
        command = [sys.executable, str(_ARM), *arguments]
        env: dict[str, str] | None = environment(home)
        if arguments[0] == "streamed":
            env = without_block_cache(env) or env  # as the command does
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the arm {self.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self, counts: bool) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = answer["peak"]
        self.losses.append(answer["loss"])
        if counts:
            self.seconds.append(answer["cpu_s"])

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(home: Path, case: Case, budgets: Sequence[str], rounds: int) -> list[list[object]]:
    """A row for each arm."""
    recipe, sequences, _, compute = case
    changes = {"train.batch_size": sequences, "train.steps": 100000, "optimizer.warmup": 0.0, "optimizer.lr": 1e-5}
    changes["exact.compute"] = compute
    session = home / f"{recipe}-{sequences}"
    told = ["--recipe", recipe, "--data", str(king_james()), *settings(changes)]
    edgetrain(home, "import", str(smollm2()), str(session), *told).require()
    # Tokenised before the arms: they would carry the memory of it.
    subprocess.run([sys.executable, str(_ARM), "tokenise", str(session)], check=True)
    arms = []
    for budget in budgets:
        copy, trial = home / f"{session.name}-{budget}", home / "trial"
        shutil.copytree(session, copy)
        within = ["--memory-budget", budget, "--threads", "1"]
        # Measures this machine, and tokenises.
        plan = edgetrain(home, "plan", str(copy), *within).require().value
        progress(f"{budget}: {plan['choice']}, {plan['step_s']:.1f} s a step planned")
        shutil.copytree(session, trial)
        one_step = ["--visits", "1", "--set", "train.visit_steps=1"]
        trained = edgetrain(home, "train", str(trial), *within, *one_step).require().value
        shutil.rmtree(trial)
        progress(f"peak {mib(trained['peak_bytes'])} MiB, plan {mib(trained['plan_peak_bytes'])}")
        arms.append((Arm(f"edgetrain {budget}", home, "streamed", str(copy), json.dumps(plan)), copy, trained))
    train = "lora" if recipe == "lora" else "all"
    plain = [
        Arm(f"in memory, {n} at once", home, "in-memory", str(smollm2()), str(session), str(n), train)
        for n in sorted({1, min(4, sequences)})
    ]
    every = [arm for arm, _, _ in arms] + plain
    for number in range(rounds + 1):
        for arm in every:
            arm.step(counts=number > 0)
            progress(f"round {number} of {rounds}, {arm.name}: loss {arm.losses[-1]:.4f}")
    for arm in every:
        arm.end()
    tokens = 256 * sequences
    rates = {arm.name: tokens / statistics.median(arm.seconds) for arm in every}
    best = max(rates[arm.name] for arm in plain)
    rows: list[list[object]] = []
    for arm in every:
        rate = rates[arm.name]
        found = next((one for one in arms if one[0] is arm), None)
        plan_peak: object = "-"
        if found is not None:
            share = min(1.0, commit_s(found[1]) / _COMMIT_EVERY_S)
            rate *= 1 - share
            plan_peak = mib(found[2]["plan_peak_bytes"])
        same = rates["in memory, 1 at once"]
        kind = recipe if compute == "fp32" or found is None else f"{recipe}, {compute}"
        rows.append([kind, sequences, arm.name, f"{rate:.1f}", f"{rate / best:.3f}", f"{rate / same:.3f}",
                     mib(max(arm.peak_bytes, found[2]["peak_bytes"] if found else 0)), plan_peak])  # fmt: skip
        progress(str(rows[-1]))
    differing = max(abs(a / b - 1) for arm in every for a, b in zip(arm.losses, plain[0].losses, strict=True))
    progress(f"losses differ by at most {differing:.2e}, relative")
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--only", choices=CASES, help="one case alone")
    told = arguments.parse_args()
    rows = []
    with temporary_folder() as home:
        for name, case in CASES.items():
            if told.only in (None, name):
                folder = home / name
                folder.mkdir()
                rounds, budgets = (1, case[2][:1]) if told.quick else (told.rounds, case[2])
                rows += measure(folder, case, budgets, rounds)
                shutil.rmtree(folder)
    columns = ["recipe", "sequences a step", "arm", "tokens / CPU s", "of the best in memory", "of 1 at once"]
    title = "SmolLM2-135M, 256 tokens, fp32, one thread (`exact_speed.py`)"
    wanted = "wanted: 0.66 at 4 sequences within 320 MiB, 0.72 at 16, 0.98 where all stays resident"
    report(told.out, title, [*columns, "peak MiB", "plan MiB"], rows, wanted)


if __name__ == "__main__":
    main()
