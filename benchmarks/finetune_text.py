"""Real fine-tuning: SmolLM2-135M on the King James text, streamed within a budget and in memory, on the same data.

Held-out loss before and after, the difference between the two trainings, and what the model writes before and after.
In memory: transformers' model and torch's AdamW with the same batches, learning rates and weight decay.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import edgetrain, environment, mib, parser, progress, report, settings, temporary_folder
from language import king_james, smollm2

_PROMPTS = ("And it came to pass in those days, that", "The LORD is my")
_LENGTH, _SEQUENCES = 128, 1


def in_memory(session: Path, steps: int, limit: int) -> dict[str, Any]:
    """The losses of the steps of a training in memory, and the held-out loss after it."""
    import torch

    torch.set_num_threads(1)
    from transformers import LlamaForCausalLM

    from edgetrain.data.text import open_text
    from edgetrain.models.language import LanguageNetwork
    from edgetrain.schedule import learning_rate
    from edgetrain.session import Session

    opened = Session.open(session)
    spec = opened.spec

    def data(split: str) -> Any:
        return open_text(spec.text, split, opened.model_files, spec.language.vocab_size, opened.scratch, 0)

    network = LanguageNetwork(spec, data("train"))
    model: Any = LlamaForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    told = spec.optimizer
    groups = [{"params": decayed, "weight_decay": told.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=told.lr, betas=(told.beta1, told.beta2), eps=told.eps, fused=True)

    def losses(tokens: Any, targets: Any) -> Any:
        logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets.reshape(-1)), reduction="none")

    made = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(told, step, spec.train.steps)
        made.append(0.0)
        for first in range(spec.train.batch_size):
            batch = network.draw(step, first, 1)
            loss = (losses(batch["tokens"], batch["targets"]) * torch.from_numpy(batch["weights"])).sum()
            loss.backward()
            made[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress(f"in memory: step {step} of {steps}")
    held_out = data("held_out")
    total = weight = 0.0
    import numpy as np

    with torch.no_grad():
        for first in range(0, min(limit, held_out.num_examples), 8):
            tokens, targets, weights = held_out.read(np.arange(first, min(first + 8, limit, held_out.num_examples)))
            total += float((losses(tokens, targets).double() * torch.from_numpy(weights.reshape(-1))).sum())
            weight += float(weights.sum())
    return {"held_out": total / weight, "losses": made}


def largest_difference(session: Path, losses: list[float]) -> tuple[int, float]:
    """Over how many of the first 20 steps, and how much, the losses that a session logged differ, relative. A log has
    at most one step a second."""
    logged = {one["step"]: one["loss"] for one in map(json.loads, (session / "metrics.jsonl").read_text().splitlines())}
    known = [step for step in range(min(20, len(losses))) if step in logged]
    return len(known), max(abs(logged[step] / losses[step] - 1) for step in known)


def main() -> None:
    if "--in-memory" in sys.argv:
        session, steps, limit = sys.argv[sys.argv.index("--in-memory") + 1 :]
        print(json.dumps(in_memory(Path(session), int(steps), int(limit))))
        return
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--budget", default="320MiB")
    told = arguments.parse_args()
    steps, limit = (4, 16) if told.quick else (told.steps, 200)
    changes = {
        "data.length": _LENGTH, "train.batch_size": _SEQUENCES, "train.micro_batch": 1, "train.steps": steps,
        "optimizer.lr": 5e-5, "optimizer.clip": 1e9,
    }  # fmt: skip
    with temporary_folder() as home:
        session, copy = home / "session", home / "copy"
        words = ["--data", str(king_james()), *settings(changes)]
        edgetrain(home, "import", str(smollm2()), str(session), *words).require()
        shutil.copytree(session, copy)

        def held_out_loss() -> float:
            options = ["--memory-budget", told.budget, "--limit", str(limit), "--threads", "1"]
            results = edgetrain(home, "evaluate", str(session), *options).require().value["results"]
            return float(next(row["value"] for row in results if row["metric"] == "loss"))

        def samples() -> list[str]:
            options = ["--memory-budget", told.budget, "--max-tokens", "40", "--threads", "1"]
            texts = [
                edgetrain(home, "generate", str(session), "--prompt", p, *options).require().value for p in _PROMPTS
            ]
            return [
                f"{prompt}{value['text']}".replace("\n", " / ") for prompt, value in zip(_PROMPTS, texts, strict=True)
            ]

        before, written = held_out_loss(), samples()
        progress(f"before: {before:.4f}; {written}")
        trained = (
            edgetrain(home, "train", str(session), "--memory-budget", told.budget, "--threads", "1").require().value
        )
        after, rewritten = held_out_loss(), samples()
        progress(f"after: {after:.4f}; {rewritten}")
        command = [sys.executable, __file__, "--in-memory", str(copy), str(steps), str(limit)]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(home)).stdout
        )
        plain = found["held_out"]
        steps_compared, loss_difference = largest_difference(session, found["losses"])
    rows = [
        ["before", f"{before:.4f}", "-"],
        [f"edgetrain within {told.budget}", f"{after:.4f}", mib(trained["peak_bytes"])],
        ["in memory", f"{plain:.4f}", "-"],
    ]
    title = (
        f"SmolLM2-135M on the King James text, {steps} steps of {_SEQUENCES} x {_LENGTH} tokens (`finetune_text.py`)"
    )
    pairs = [f"before: {a}" for a in written] + [f"after: {a}" for a in rewritten]
    report(told.out, title, ["", "held-out loss", "peak MiB"], rows,
           f"difference between the trainings: {abs(after - plain):.4f} (below 0.01 is wanted)",
           f"losses of {steps_compared} of the first 20 steps differ by at most {loss_difference:.1e}, relative "
           "(below 1e-3 is wanted)", *pairs)  # fmt: skip


if __name__ == "__main__":
    main()
