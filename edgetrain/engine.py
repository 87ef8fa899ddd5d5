"""The one training loop: load a block, run optimizer steps on it, write it back, commit, go on to the next.

Every number depends on the spec and on counters alone. What may differ from run to run (moments resident or streamed,
activations kept, recomputed or offloaded, order and length of visits between independent blocks) changes no bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from devices import Device, Tier
from devices.limits import is_out_of_memory, return_freed_memory
from edgetrain.activations import Activations, Keep, Offload, Recompute
from edgetrain.errors import BudgetBroken, TrainingDiverged
from edgetrain.models import build_family
from edgetrain.models.base import Family
from edgetrain.objectives.base import Block, Objective
from edgetrain.objectives.diffusion_blocks import Codebook
from edgetrain.optim import AdamW, learning_rate
from edgetrain.plan import Choice
from edgetrain.resident import Resident, Update
from edgetrain.session import BlockProgress, Session
from edgetrain.spec import OptimizerSpec, Spec
from edgetrain.stages import Shapes, Stage, group_of_block, largest_block, stages_of_block
from edgetrain.store import Transaction
from edgetrain.store.layout import TensorSpec

_COMMIT_EVERY_S = 60.0
# A step without a finite loss, or with one this many times that of guessing, is skipped. So many in a row, all on the
# same weights, are not going to end.
_HOPELESS_LOSS = 100.0
_MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. ``loss`` is None where the step was skipped: not finite, or hopeless."""

    block: int
    step: int
    loss: float | None
    gradient_norm: float
    lr: float
    seconds: float


def build_modules(spec: Spec, family: Family, block: int) -> Block:
    """The modules of one block, on meta: without memory until they are bound."""
    with torch.device("meta"):
        return Block(
            block,
            Codebook(spec.model.num_classes, spec.model.width),
            family.build_stem(),
            [family.build_layer() for _ in spec.layers_of(block)],
            family.build_head(),
        )


def bind(resident: Resident, spec: Spec, shapes: Shapes, family: Family, block: int) -> Block:
    """Builds the modules of ``block`` and points their parameters into the resident buffers."""
    modules = build_modules(spec, family, block)
    in_order: list[nn.Module] = [modules.codebook, modules.stem, *modules.layers, modules.head]
    stages = stages_of_block(spec, block)
    resident.bind([(s, s.layout(shapes), module) for s, module in zip(stages, in_order, strict=True)])
    return modules


def warm_up_kernels(device: Device) -> None:
    """Runs what a step needs beside forward and backward once: the norm, the optimizer, a failing allocation."""
    small = [torch.zeros(16, device=device.torch_device) for _ in range(4)]
    torch.linalg.vector_norm(small[0]).item()
    AdamW(OptimizerSpec()).update(*([one] for one in small), number=1, lr=0.0, decays=True)
    try:  # the code of the error path is read in now, not when memory is short
        torch.empty(1 << 50, dtype=torch.uint8)
    except RuntimeError as error:
        is_out_of_memory(error)


class Engine:
    """Trains the blocks of a session on a device, within what the plan chose."""

    def __init__(self, session: Session, device: Device, choice: Choice, objective: Objective) -> None:
        self.session, self.device, self.objective = session, device, objective
        self.spec = session.spec
        self.family = build_family(self.spec)
        self.optimizer = AdamW(self.spec.optimizer)
        self.resident = Resident(device, largest_block(self.spec, session.shapes), choice.moments_resident)
        self.activations = self._activations(choice.activations)
        self.micro_batch = choice.micro_batch
        self.retries = 0

    def _activations(self, kind: str) -> Activations:
        if kind == "keep":
            return Keep()
        if kind == "recompute":
            return Recompute()
        tier = Tier.DISK if self.device.capabilities.host_addressable else Tier.HOST
        return Offload(self.device, tier, self.resident.owns)

    def warm_up(self) -> None:
        """Touches the buffers and runs every operation of a step once, on the smallest micro-batch.

        What an operation needs for itself (its code, tables, threads) is in memory afterwards, so that the limit can
        be drawn around it. Nothing of the session changes.
        """
        self.resident.touch()
        block = bind(self.resident, self.spec, self.session.shapes, self.family, 0)
        self.resident.load(self.session.store)
        for activations in (Keep(), self.activations):
            self._accumulate(block, self.session.progress(0).step, 1, 1, activations)
        with torch.no_grad():
            self._accumulate(block, self.session.progress(0).step, 1, 1, Keep())
        self.resident.flat_gradient().zero_()
        warm_up_kernels(self.device)

    def prefetch(self, block: int) -> None:
        """Lets the system read ahead what a visit of ``block`` will load."""
        self.session.store.prefetch(stage.name for stage in stages_of_block(self.spec, block))

    def visit(
        self, block: int, num_steps: int, on_step: Callable[[Step], None], stop: Callable[[], bool] = lambda: False
    ) -> BlockProgress:
        """Up to ``num_steps`` optimizer steps on ``block``, committed at the end and at least once a minute.

        The last commit goes on beside the next visit; ``store.flush`` waits for it.

        Raises:
            BudgetBroken: memory ran out and there was nothing left to give up.
            TrainingDiverged: the loss is lost; what was committed before stays, and its loss was not.
            DiskError: a write failed; likewise.
        """
        store = self.session.store
        group = group_of_block(self.spec, block)
        transaction = store.transaction(group)
        progress = self.session.progress(block)
        modules = bind(self.resident, self.spec, self.session.shapes, self.family, block)
        if self.micro_batch < progress.micro_batches[-1][1]:  # the budget is smaller than it was
            progress = _with_micro_batch(progress, self.micro_batch)
            transaction = self._commit(transaction, modules, progress)
        self.resident.load(store)
        last_commit, end = time.monotonic(), progress.step + num_steps
        try:
            while progress.step < end and not stop():
                if time.monotonic() - last_commit > _COMMIT_EVERY_S:
                    transaction = self._commit(transaction, modules, progress)
                    last_commit = time.monotonic()
                done = self._step(modules, transaction, progress)
                if isinstance(done, BlockProgress):  # the micro-batch had to change: durable before it takes effect
                    progress = done
                    transaction = self._commit(transaction, modules, progress)
                    continue
                progress = replace(progress, step=progress.step + 1)
                if done.loss is None:
                    progress = replace(progress, skipped=(*progress.skipped, done.step))
                    if progress.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
                        raise self._diverged(block, done.step)
                else:
                    progress = replace(progress, loss=done.loss)
                on_step(done)
            if progress != self.session.progress(block):
                self._save(transaction, modules, progress)
                transaction.commit_async(self.session.group_state(block, progress))
        finally:
            transaction.discard()
        return progress

    def _commit(self, transaction: Transaction, block: Block, progress: BlockProgress) -> Transaction:
        """Commits in the midst of a visit, and begins the next transaction."""
        self._save(transaction, block, progress)
        transaction.commit(self.session.group_state(block.index, progress))
        return self.session.store.transaction(group_of_block(self.spec, block.index))

    def _save(self, transaction: Transaction, block: Block, progress: BlockProgress) -> None:
        """Writes the block back, unless every step since the last commit was skipped: then nothing changed."""
        new_updates = progress.updates - self.session.progress(block.index).updates
        if new_updates > 0:
            # Where steps followed an update and were good, one more forward for the last one would buy little.
            if progress.skipped_in_a_row or new_updates == 1:
                self._look_ahead(block, progress)
            self.resident.save(transaction)

    def _look_ahead(self, block: Block, progress: BlockProgress) -> None:
        """Raises TrainingDiverged if no weights after these could be reached: every step to come would be skipped.

        What an update did shows in the losses after it. A session that diverged should have at its last commit weights
        that a lower learning rate can go on from.
        """
        micro_batch = progress.micro_batches[-1][1]
        end = progress.step + _MAX_SKIPPED_IN_A_ROW - progress.skipped_in_a_row
        for step in range(progress.step, end):
            with torch.no_grad():
                while isinstance(loss := self._attempt(block, step, micro_batch, Keep()), str):
                    micro_batch = _halved(micro_batch, step, block, loss)
            if self._is_sensible(loss):
                return
        raise self._diverged(block.index, end - 1)

    def _is_sensible(self, loss: float) -> bool:
        return loss <= _HOPELESS_LOSS * math.log(max(2, self.spec.model.num_classes))  # a NaN is not

    def _diverged(self, block: int, step: int) -> TrainingDiverged:
        return TrainingDiverged(
            f"block {block} diverged: the loss of the {_MAX_SKIPPED_IN_A_ROW} steps up to step {step} is not finite "
            f"or more than {_HOPELESS_LOSS:g} times that of guessing",
            f"Lower the learning rate, now {self.spec.optimizer.lr:g} (--set optimizer.lr=...), and start again: "
            "the session is as it was at its last commit, before the loss was lost.",
        )

    def _step(self, block: Block, transaction: Transaction, progress: BlockProgress) -> Step | BlockProgress:
        """One optimizer step; or, if only a smaller micro-batch fits, the progress with that noted and no step."""
        began = time.perf_counter()
        step = progress.step
        micro_batch = progress.micro_batches[-1][1]
        while isinstance(loss := self._attempt(block, step, micro_batch, self.activations), str):
            if not isinstance(self.activations, Keep):
                return _with_micro_batch(progress, _halved(micro_batch, step, block, loss))
            self.activations = Recompute()
        gradient = self.resident.flat_gradient()
        norm = torch.linalg.vector_norm(gradient).item() if self._is_sensible(loss) else math.nan
        if math.isfinite(norm):
            if norm > self.spec.optimizer.clip:
                gradient.mul_(self.spec.optimizer.clip / norm)
            self.resident.update(self.optimizer, transaction, self._updates(block.index, progress))
        lr = learning_rate(self.spec.optimizer, step, self.spec.train.steps)
        return Step(block.index, step, loss if math.isfinite(norm) else None, norm, lr, time.perf_counter() - began)

    def _attempt(self, block: Block, step: int, micro_batch: int, activations: Activations) -> float | str:
        """The mean loss of a step's batch, as ``_accumulate``; if memory ran out, what was said of it."""
        try:
            return self._accumulate(block, step, self.spec.train.batch_size, micro_batch, activations)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)  # the exception itself would keep its frames' tensors alive
        return_freed_memory()
        self.retries += 1
        return reason

    def _accumulate(
        self, block: Block, step: int, batch_size: int, micro_batch: int, activations: Activations
    ) -> float:
        """Gradients of a whole batch, split into micro-batches of consecutive examples; the mean loss.

        Stops at the first loss that is not finite. Inside ``torch.no_grad`` the loss alone.
        """
        self.resident.flat_gradient().zero_()
        total = 0.0
        for first in range(0, batch_size, micro_batch):
            draw = self._to_device(self.objective.draw(block.index, step, first, min(micro_batch, batch_size - first)))
            loss = self.objective.loss(block, draw, activations)
            total += loss.item()
            if not math.isfinite(total):
                break
            if loss.requires_grad:
                loss.backward()
        return total

    def _to_device(self, draw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(self.device.torch_device) for name, array in draw.items()}

    def _updates(self, block: int, progress: BlockProgress) -> Callable[[Stage, TensorSpec], Update]:
        """How each parameter is updated in the step after ``progress``: a private or only block's own step decides,
        for a stage that several blocks share the progress of all of them."""
        total = self.spec.train.steps
        own_lr = learning_rate(self.spec.optimizer, progress.step, total)
        others = (self.session.progress(other) for other in range(self.spec.num_blocks) if other != block)
        everywhere = [progress, *others] if self.spec.diffusion_blocks.has_shared else [progress]
        all_lr = learning_rate(self.spec.optimizer, sum(p.step for p in everywhere), total * self.spec.num_blocks)
        all_updates = sum(p.updates for p in everywhere)

        def update(stage: Stage, tensor: TensorSpec) -> Update:
            decays = self.family.decays(tensor.name, tensor.shape)
            if stage.sharing == "shared":
                return Update(all_lr, all_updates + 1, decays)
            return Update(own_lr, progress.updates + 1, decays)

        return update


def _halved(micro_batch: int, step: int, block: Block, reason: str) -> int:
    """The micro-batch to try when this one does not fit."""
    if micro_batch == 1:
        raise BudgetBroken(
            f"memory ran out in step {step} of block {block.index} with one example at a time: {reason}",
            "Raise --memory-budget; the session is as it was at its last commit.",
        )
    return (micro_batch + 1) // 2


def _with_micro_batch(progress: BlockProgress, micro_batch: int) -> BlockProgress:
    """From the next step on."""
    return replace(progress, micro_batches=(*progress.micro_batches, (progress.step, micro_batch)))
