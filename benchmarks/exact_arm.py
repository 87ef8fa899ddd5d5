"""One arm of ``exact_speed.py``: makes an optimizer step whenever a line comes in, and tells what it cost.

A file of its own: what the benchmark around it imports would count in the memory of the arm.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def tokenise(session: Path) -> None:
    from edgetrain.data.text import open_text
    from edgetrain.session import Session

    opened = Session.open(session)
    spec = opened.spec
    open_text(spec.text, "train", opened.model_files, spec.language.vocab_size, opened.scratch, 0)


def in_memory(folder: Path, session: Path, micro_batch: int, train: str) -> None:
    """The arm without edgetrain: its data alone is edgetrain's."""
    import torch

    torch.set_num_threads(1)
    from transformers import LlamaForCausalLM

    from edgetrain.data.text import open_text
    from edgetrain.models.language import LanguageNetwork
    from edgetrain.session import Session

    opened = Session.open(session)
    spec = opened.spec
    dataset = open_text(spec.text, "train", opened.model_files, spec.language.vocab_size, opened.scratch, 0)
    network = LanguageNetwork(spec, dataset)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        exact = spec.exact
        targets: Any = "all-linear" if exact.targets == ("all-linear",) else list(exact.targets)
        model = get_peft_model(model, LoraConfig(r=exact.rank, lora_alpha=exact.alpha, target_modules=targets))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)
    tell(ready=True)
    for step, _ in enumerate(sys.stdin):
        began, total = cpu_s(), 0.0
        for first in range(0, spec.train.batch_size, micro_batch):
            batch = network.draw(step, first, micro_batch)
            logits = model(input_ids=torch.from_numpy(batch["tokens"]), use_cache=False).logits.flatten(0, 1)
            each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch["targets"]), reduction="none")
            loss = (each * torch.from_numpy(batch["weights"])).sum()
            total += loss.item()
            loss.backward()
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(cpu_s=cpu_s() - began, loss=total, peak=peak_bytes())


def streamed(session: Path, plan: dict[str, Any]) -> None:
    """edgetrain's arm, within its budget."""
    from edgetrain.cli.options import start_torch

    start_torch(1)
    import devices
    from edgetrain import engine as engines
    from edgetrain.data.text import open_text
    from edgetrain.governor import Governor
    from edgetrain.models.language import LanguageNetwork
    from edgetrain.plan import StreamedChoice
    from edgetrain.session import Session
    from edgetrain.streamed import StreamedTrainer

    engines._COMMIT_EVERY_S = float("inf")
    opened = Session.open(session)
    spec = opened.spec
    dataset = open_text(spec.text, "train", opened.model_files, spec.language.vocab_size, opened.scratch, 0)
    choice = StreamedChoice(**plan["choice"])
    with opened.store.lock(["model"]):
        trainer = StreamedTrainer(
            opened, devices.open_device("cpu", opened.scratch), choice, LanguageNetwork(spec, dataset)
        )
        engine = engines.Engine(opened, trainer, choice.micro_batch)
        engine.warm_up()
        with Governor(plan["budget_bytes"]).hold(1 << 20):
            began = 0.0

            def wait() -> None:
                nonlocal began
                if not sys.stdin.readline():
                    raise EOFError
                began = cpu_s()

            def on_step(step: engines.Step) -> None:
                tell(cpu_s=cpu_s() - began, loss=step.loss, peak=peak_bytes(), retries=trainer.retries)
                wait()

            tell(ready=True)
            try:
                wait()
                engine.visit(0, 1 << 30, on_step)
            except EOFError:
                pass


def peak_bytes() -> int:
    from devices.meter import usage

    return usage().peak_bytes


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "tokenise":
        tokenise(Path(rest[0]))
    elif kind == "in-memory":
        in_memory(Path(rest[0]), Path(rest[1]), int(rest[2]), rest[3])
    else:
        streamed(Path(rest[0]), json.loads(rest[1]))
