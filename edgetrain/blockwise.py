"""A whole block resident at a time: the trainer of diffusion_blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, cast

import torch

from devices import Device, Tier
from devices.limits import is_out_of_memory, keep_freed_memory, return_freed_memory, suppress_out_of_memory
from edgetrain.activations import Activations, Keep, Offload, Recompute
from edgetrain.engine import Settle, SmallerMicroBatch, Step, Trainer, halved
from edgetrain.models import build_family
from edgetrain.models.base import Family, Layer
from edgetrain.models.codebook import Codebook
from edgetrain.objectives.base import Block, Objective
from edgetrain.optim import AdamW, warm_up_kernels
from edgetrain.plan import Choice
from edgetrain.resident import Resident
from edgetrain.schedule import block_settings, learning_rate
from edgetrain.session import BlockProgress, Session
from edgetrain.spec import ModelSpec, Spec, TextModelSpec
from edgetrain.stages import Shapes, largest_block, stages_of_block
from edgetrain.store import Transaction


def build_modules(spec: Spec, family: Family, block: int) -> Block:
    """The modules of one block, on meta: without memory until they are bound."""
    kinds = [stage.kind for stage in stages_of_block(spec, block) if stage.kind != "codebook"]
    with torch.device("meta"):
        stem, *layers, head = (family.build(kind) for kind in kinds)
        rows = spec.codebook_rows
        assert isinstance(spec.model, (ModelSpec, TextModelSpec))
        return Block(block, stem, cast("list[Layer]", layers), head, Codebook(rows, spec.model.width) if rows else None)


def bind(resident: Resident, spec: Spec, shapes: Shapes, family: Family, block: int) -> Block:
    """Builds the modules of ``block`` and points their parameters into the resident buffers."""
    modules = build_modules(spec, family, block)
    stages = stages_of_block(spec, block)
    resident.bind([(s, s.layout(shapes), module) for s, module in zip(stages, modules.modules, strict=True)])
    return modules


class BlockTrainer(Trainer):
    """Steps on one block, which stays resident from the beginning of a visit to its end."""

    def __init__(self, session: Session, device: Device, choice: Choice, objective: Objective) -> None:
        self.session, self.device, self.objective = session, device, objective
        self.spec = session.spec
        self.family = build_family(self.spec)
        self.optimizer = AdamW(self.spec.optimizer)
        self.resident = Resident(device, [largest_block(self.spec, session.shapes)], choice.moments_resident)
        self.activations = self._activations(choice.activations)
        self._keeps_freed, self._micro_batch = choice.keeps_freed, choice.micro_batch
        self.block = build_modules(self.spec, self.family, 0)

    def _activations(self, kind: str) -> Activations:
        if kind == "keep":
            return Keep()
        if kind == "recompute":
            return Recompute()
        tier = Tier.DISK if self.device.capabilities.host_addressable else Tier.HOST
        return Offload(self.device, tier, self.resident.owns)

    @property
    def offloaded_bytes(self) -> int:
        return self.activations.offloaded_bytes

    @property
    def policy(self) -> str:
        return type(self.activations).__name__.lower()

    @property
    def guess(self) -> float:
        return self.objective.guess

    def warm_up(self, progress: BlockProgress) -> None:
        self.resident.touch()
        self.enter(0)
        for activations in (Keep(), self.activations):
            self._accumulate(progress.step, 1, 1, activations)
        with torch.no_grad():
            self._accumulate(progress.step, 1, 1, Keep())
        self.resident.flat_gradient().zero_()
        warm_up_kernels(self.device)
        # Not before: what libraries take once, and keep, would lie between the holes.
        keep_freed_memory(self._keeps_freed)

    def run_all_sizes(self, progress: BlockProgress) -> None:
        for count in sorted({self._micro_batch, self.spec.train.batch_size % self._micro_batch} - {0, 1}):
            with suppress_out_of_memory():
                self._accumulate(progress.step, count, count, self.activations)
        self.resident.flat_gradient().zero_()

    def prefetch(self, block: int) -> None:
        self.session.store.prefetch(stage.name for stage in stages_of_block(self.spec, block))

    def enter(self, block: int) -> None:
        self.block = bind(self.resident, self.spec, self.session.shapes, self.family, block)
        self.resident.load(self.session.store.read)

    def save(self, transaction: Transaction) -> None:
        self.resident.save(transaction.write)

    def step(self, progress: BlockProgress, transaction: Transaction, settle: Settle) -> Step | SmallerMicroBatch:
        began = time.perf_counter()
        step, micro_batch = progress.step, progress.micro_batch
        while isinstance(loss := self._attempt(step, micro_batch, self.activations), str):
            if self._closed_holes():
                continue
            if not isinstance(self.activations, Keep):
                return SmallerMicroBatch(halved(micro_batch, step, loss))
            self.activations = Recompute()
        gradient = self.resident.flat_gradient()
        norm = torch.linalg.vector_norm(gradient).item() if self.is_sensible(loss) else math.nan
        if math.isfinite(norm):
            transaction = settle()
            if norm > self.spec.optimizer.clip:
                gradient.mul_(self.spec.optimizer.clip / norm)
            settings = block_settings(self.session, self.block.index, progress)
            self.resident.update(self.optimizer, transaction.read, transaction.write, settings)
        lr = learning_rate(self.spec.optimizer, step, self.spec.train.steps)
        good = loss if math.isfinite(norm) else None
        return Step(self.block.index, step, good, norm, lr, time.perf_counter() - began)

    def loss(self, progress: BlockProgress, step: int, transaction: Transaction) -> float:
        micro_batch = progress.micro_batch
        with torch.no_grad():
            while isinstance(loss := self._attempt(step, micro_batch, Keep()), str):
                if not self._closed_holes():
                    micro_batch = halved(micro_batch, step, loss)
        return loss

    def _closed_holes(self) -> bool:
        """After memory ran out: whether freed memory was kept until now."""
        kept, self._keeps_freed = self._keeps_freed, False
        keep_freed_memory(False)
        return_freed_memory()
        return kept

    def _attempt(self, step: int, micro_batch: int, activations: Activations) -> float | str:
        """The mean loss of a step's batch, as ``_accumulate``; if memory ran out, what was said of it."""
        try:
            return self._accumulate(step, self.spec.train.batch_size, micro_batch, activations)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)  # the exception itself would keep its frames' tensors alive
        self.retries += 1
        return reason

    def _accumulate(self, step: int, batch_size: int, micro_batch: int, activations: Activations) -> float:
        """Gradients of a whole batch, split into micro-batches of consecutive examples; the mean loss.

        Stops at the first loss that is not finite. Inside ``torch.no_grad`` the loss alone.
        """
        self.resident.flat_gradient().zero_()
        total = 0.0
        for first in range(0, batch_size, micro_batch):
            count = min(micro_batch, batch_size - first)
            draw = self._to_device(self.objective.draw(self.block.index, step, first, count))
            loss = self.objective.loss(self.block, draw, activations)
            total += loss.item()
            if not math.isfinite(total):
                break
            if loss.requires_grad:
                loss.backward()
        return total

    def _to_device(self, draw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(self.device.torch_device) for name, array in draw.items()}
