"""What streaming costs: wall time per optimizer step of edgetrain against plain PyTorch loops on the same block.

edgetrain's engine makes visits of K steps over three blocks: loading, training, writing back and the durable commit are
all inside its time. The plain loop has each block resident from the start: the same modules, data and draws,
``torch.optim.AdamW(fused=True)``, gradient clipping, the same learning rates. Visits alternate in one process; medians
over visits, ratio of the medians.

The plain loop runs twice: once with the allocator's thresholds that edgetrain sets for its limit (blocks from 64 KiB on
are mapped), once with those that an ordinary process reaches by itself (32 MiB). The second ratio is the one that
counts: it has everything in it that edgetrain does differently. To show: at most 1.07 for K >= 20. The losses of the
three at the end of their first visits must agree to 1 %, or they did not do the same.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import parser, progress, report, temporary_folder

from devices.limits import prepare_process

if TYPE_CHECKING:
    from edgetrain.blockwise import BlockTrainer
    from edgetrain.session import Session

_BUDGET_BYTES = 4 << 30
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_ARMS = ("edgetrain", "plain, same allocator", "plain")


def set_allocator(ordinary: bool) -> None:
    """The thresholds that an ordinary process's glibc reaches by itself, or those of edgetrain."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, 32 << 20 if ordinary else 1 << 16)
    mallopt(_TRIM_THRESHOLD, 64 << 20 if ordinary else 1 << 30)


class Plain:
    """A block of the session, resident, trained as one would by hand."""

    def __init__(self, session: Session, trainer: BlockTrainer, block: int) -> None:
        import torch

        from edgetrain.blockwise import bind, build_modules

        self.spec, self.objective, self.step = session.spec, trainer.objective, 0
        bound = bind(trainer.resident, self.spec, session.shapes, trainer.family, block)
        trainer.resident.load(session.store.read)
        self.block = build_modules(self.spec, trainer.family, block)
        modules = list(zip(self._modules(self.block), self._modules(bound), strict=True))
        for mine, theirs in modules:
            mine.to_empty(device="cpu").load_state_dict(theirs.state_dict())
        self.block.codebook.requires_grad_(False)
        decayed: dict[bool, list[Any]] = {True: [], False: []}
        for mine, _ in modules[1:]:
            for name, parameter in mine.named_parameters():
                decayed[trainer.family.decays(name, tuple(parameter.shape))].append(parameter)
        self.parameters = [*decayed[True], *decayed[False]]
        told = self.spec.optimizer
        groups = [{"params": p, "weight_decay": told.weight_decay if yes else 0.0} for yes, p in decayed.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(told.beta1, told.beta2), eps=told.eps, fused=True)

    @staticmethod
    def _modules(block: Any) -> list[Any]:
        return [block.codebook, block.stem, *block.layers, block.head]

    def visit(self, num_steps: int) -> float:
        """The loss of the last step."""
        import torch

        from edgetrain.activations import Keep
        from edgetrain.schedule import learning_rate

        train, total = self.spec.train, 0.0
        for _ in range(num_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.spec.optimizer, self.step, train.steps)
            self.optimizer.zero_grad()
            total = 0.0
            for first in range(0, train.batch_size, train.micro_batch):
                count = min(train.micro_batch, train.batch_size - first)
                arrays = self.objective.draw(self.block.index, self.step, first, count)
                loss = self.objective.loss(self.block, {k: torch.from_numpy(v) for k, v in arrays.items()}, Keep())
                total += loss.item()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.optimizer.clip)
            self.optimizer.step()
            self.step += 1
        return total


def measure(folder: Path, width: int, length: int, rounds: int, threads: int) -> tuple[dict[str, float], float]:
    """Median seconds a step of each arm, and the largest relative difference of a visit's last loss."""
    import devices
    from edgetrain import plan as planning
    from edgetrain.blockwise import BlockTrainer
    from edgetrain.data import open_dataset
    from edgetrain.engine import Engine
    from edgetrain.objectives.diffusion_blocks import diffusion_blocks
    from edgetrain.probe import measure
    from edgetrain.recipe import load_recipe, resolve
    from edgetrain.stages import group_of_block
    from edgetrain.training import create
    from edgetrain.training_data import training_batches

    folder.mkdir()
    dataset = open_dataset("digits", "train", folder / "scratch-data")
    changes = {
        "model.width": width,
        "train.visit_steps": length,
        "train.steps": 100_000,
        "train.batch_size": 64,
        "train.micro_batch": 64,
    }
    known = {"model.image_shape": list(dataset.image_shape), "model.num_classes": dataset.num_classes}
    spec = resolve(load_recipe("vit-digits"), {**changes, **known})
    probe = planning.Probe.from_json(measure(spec, "cpu", _BUDGET_BYTES))
    choice = planning.make_plan(spec, probe, _BUDGET_BYTES, threads, "keep").choice
    session = create(folder / "session", spec, probe)
    objective = diffusion_blocks(spec, training_batches(spec, dataset))
    trainer = BlockTrainer(session, devices.open_device("cpu", session.scratch), choice, objective)
    engine = Engine(session, trainer, choice.micro_batch)
    blocks = range(spec.num_blocks)
    plain = {arm: [Plain(session, trainer, block) for block in blocks] for arm in _ARMS[1:]}
    seconds: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    differing = 0.0
    with session.store.lock({group_of_block(spec, block) for block in blocks}):
        engine.warm_up()
        for number in range(rounds + 1):
            for block in blocks:
                losses = {}
                for arm in _ARMS:
                    set_allocator(ordinary=arm == "plain")
                    began = time.perf_counter()
                    if arm == "edgetrain":
                        losses[arm] = engine.visit(block, length, lambda step: None).loss
                        session.store.flush()
                    else:
                        losses[arm] = plain[arm][block].visit(length)
                    if number:  # the first round warms up
                        seconds[arm].append((time.perf_counter() - began) / length)
                if not number:  # roundings differ, and later on training multiplies that
                    differing = max(
                        differing, *(abs(loss / (losses["plain"] or 1) - 1) for loss in losses.values() if loss)
                    )
        progress(f"width {width}, visits of {length}: last losses {losses}")
    return {arm: statistics.median(found) for arm, found in seconds.items()}, differing


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=10, help="rounds of three visits of 20 steps; of longer ones fewer")
    options = made.parse_args()
    prepare_process(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    rows: list[list[object]] = []
    worst = 0.0
    with temporary_folder() as folder:
        for width in (64,) if options.quick else (64, 256):
            for length in (20, 75):
                rounds = 2 if options.quick else max(3, options.rounds * 20 // length)
                medians, differing = measure(folder / f"{width}-{length}", width, length, rounds, options.threads)
                worst = max(worst, differing)
                ratios = [f"{medians['edgetrain'] / medians[arm]:.3f}" for arm in _ARMS[1:]]
                rows.append([width, length, *(f"{1000 * medians[arm]:.2f}" for arm in _ARMS), *ratios])
    report(
        options.out, f"Time per optimizer step, {options.threads} thread(s), ms",
        ["width", "K", *_ARMS, "ratio, same allocator", "ratio"], rows,
        f"largest difference of the first visits' losses between the three: {100 * worst:.3f} %",
    )  # fmt: skip


if __name__ == "__main__":
    main()
