"""The one training loop: optimizer steps, commits, what is skipped, and what to do when memory runs out.

Every number depends on the spec and on counters alone. What may differ from run to run (what is resident or streamed,
activations kept, recomputed or offloaded, order and length of visits between independent blocks) changes no bit.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgetrain.errors import BudgetBroken, TrainingDiverged
from edgetrain.session import BlockProgress, Session
from edgetrain.stages import group_of_block
from edgetrain.store import Transaction

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


@dataclass(frozen=True)
class SmallerMicroBatch:
    """Nothing was done of a step: memory ran out, and a smaller micro-batch is left to try."""

    size: int


class Rewind(Exception):
    """A step failed amid its updates: the weights are those of no step. Training goes on from the last commit, without
    step ``skip``, or with a smaller ``micro_batch``."""

    def __init__(self, skip: int | None = None, micro_batch: int | None = None) -> None:
        super().__init__(skip, micro_batch)
        self.skip, self.micro_batch = skip, micro_batch


Settle = Callable[[], Transaction]
"""To be called once in a step, when its loss is known to be good and before anything is changed: now the state may be
committed. Returns the transaction that takes the changes."""


class Trainer(abc.ABC):
    """How an optimizer step is made within what the plan chose; the engine decides when, and what is committed."""

    retries = 0
    """How often memory ran out and something was given up for it."""

    @property
    @abc.abstractmethod
    def offloaded_bytes(self) -> int:
        """Bytes moved to a slower tier so far."""

    @property
    @abc.abstractmethod
    def policy(self) -> str:
        """What becomes of activations now."""

    @abc.abstractmethod
    def warm_up(self, progress: BlockProgress) -> None:
        """Touches the buffers and runs every operation of a step once, on the smallest micro-batch, or where each shape
        has code of its own on all.

        What an operation needs for itself (its code, tables, threads) is in memory afterwards, so that the limit can
        be drawn around it. Nothing of the session changes.
        """

    def run_all_sizes(self, progress: BlockProgress) -> None:  # noqa: B027
        """Where kernels take of the memory that is limited when they first run: runs every size of a micro-batch once,
        as far as it fits. Nothing of the session changes."""

    @abc.abstractmethod
    def prefetch(self, block: int) -> None:
        """Lets the system read ahead what a visit of ``block`` will load."""

    @abc.abstractmethod
    def enter(self, block: int) -> None:
        """Takes up what is committed of ``block``; nothing that was resident counts any more."""

    @abc.abstractmethod
    def step(self, progress: BlockProgress, transaction: Transaction, settle: Settle) -> Step | SmallerMicroBatch:
        """The optimizer step after ``progress``, on the block that was entered.

        Raises:
            Rewind: as it says.
            BudgetBroken: memory ran out and there was nothing left to give up.
        """

    @abc.abstractmethod
    def loss(self, progress: BlockProgress, step: int, transaction: Transaction) -> float:
        """The loss of a step's batch, without a gradient."""

    @abc.abstractmethod
    def save(self, transaction: Transaction) -> None:
        """Writes what steps have changed and not written yet."""

    @property
    @abc.abstractmethod
    def guess(self) -> float:
        """The loss of guessing; infinite where nothing is known of it."""

    def is_sensible(self, loss: float) -> bool:
        """Whether a step with this loss is to be made. A NaN is not."""
        return math.isfinite(loss) and loss <= _HOPELESS_LOSS * self.guess


def halved(micro_batch: int, step: int, reason: str) -> int:
    """The micro-batch to try when this one does not fit."""
    if micro_batch == 1:
        raise BudgetBroken(
            f"memory ran out in step {step} with one example at a time: {reason}",
            "Raise --memory-budget; the session is as it was at its last commit.",
        )
    return (micro_batch + 1) // 2


class Engine:
    """Trains a session by a trainer, from commit to commit."""

    def __init__(self, session: Session, trainer: Trainer, micro_batch: int, commit_steps: int | None = None) -> None:
        """``micro_batch``: the plan's. ``commit_steps``: how many steps there are at most between two commits."""
        self.session, self.trainer, self.micro_batch = session, trainer, micro_batch
        self.commit_steps = commit_steps
        self.spec = session.spec
        self._skipping: set[int] = set()

    def warm_up(self) -> None:
        """Makes the trainer ready for the limit on memory to be drawn."""
        self.trainer.warm_up(self.session.progress(0))

    def run_all_sizes(self) -> None:
        """As ``Trainer.run_all_sizes``; under a limit, for a plan may be too low."""
        self.trainer.run_all_sizes(self.session.progress(0))

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
        visit = _Visit(self, block)
        end = visit.progress.step + num_steps
        try:
            visit.begin()
            while visit.progress.step < end and not stop():
                try:
                    done = self._step(visit)
                except Rewind as rewind:
                    visit.rewind(rewind.micro_batch)
                    if rewind.skip is not None:
                        self._skipping.add(rewind.skip)
                    continue
                if isinstance(done, SmallerMicroBatch):  # durable before it takes effect
                    visit.progress = visit.progress.with_micro_batch(done.size)
                    visit.commit()
                    continue
                visit.count(done)
                if visit.progress.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
                    raise self._diverged(block, done.step)
                on_step(done)
            visit.end()
        finally:
            visit.transaction.discard()
        return visit.progress

    def _step(self, visit: _Visit) -> Step | SmallerMicroBatch:
        if visit.progress.step in self._skipping:
            return Step(visit.block, visit.progress.step, None, math.nan, 0.0, 0.0)
        return self.trainer.step(visit.progress, visit.transaction, visit.settle)

    def look_ahead(self, visit: _Visit) -> None:
        """Raises TrainingDiverged if no weights after these could be reached: every step to come would be skipped.

        What an update did shows in the losses after it. A session that diverged should have at its last commit weights
        that a lower learning rate can go on from.
        """
        progress = visit.progress
        end = progress.step + _MAX_SKIPPED_IN_A_ROW - progress.skipped_in_a_row
        for step in range(progress.step, end):
            if self.trainer.is_sensible(self.trainer.loss(progress, step, visit.transaction)):
                return
        raise self._diverged(visit.block, end - 1)

    def _diverged(self, block: int, step: int) -> TrainingDiverged:
        return TrainingDiverged(
            f"block {block} diverged: the loss of the {_MAX_SKIPPED_IN_A_ROW} steps up to step {step} is not finite "
            f"or more than {_HOPELESS_LOSS:g} times that of guessing",
            f"Lower the learning rate, now {self.spec.optimizer.lr:g} (--set optimizer.lr=...), and start again: "
            "the session is as it was at its last commit, before the loss was lost.",
        )


class _Visit:
    """A visit under way: its progress, its open transaction, and when it was committed last."""

    def __init__(self, engine: Engine, block: int) -> None:
        self.engine, self.block = engine, block
        self.session, self.trainer = engine.session, engine.trainer
        self._group = group_of_block(engine.spec, block)
        self.transaction = self.session.store.transaction(self._group)  # waits for the last commit
        self.progress = self.session.progress(block)
        self._since = time.monotonic()

    def begin(self) -> None:
        if not self.progress.micro_batch or self.engine.micro_batch < self.progress.micro_batch:
            # The first plan of the session, or the budget is smaller than it was.
            self.progress = self.progress.with_micro_batch(self.engine.micro_batch)
            self.commit()
        self.trainer.enter(self.block)

    def count(self, step: Step) -> None:
        """Notes a step that was made, or skipped."""
        skipped = self.progress.skipped if step.loss is not None else (*self.progress.skipped, step.step)
        loss = step.loss if step.loss is not None else self.progress.loss
        self.progress = replace(self.progress, step=step.step + 1, skipped=skipped, loss=loss)

    def settle(self) -> Transaction:
        """Commits if it is time for it; there is a good loss after the last update."""
        committed = self.session.progress(self.block)
        most = self.engine.commit_steps
        many = most is not None and self.progress.step - committed.step >= most
        if self.progress != committed and (many or time.monotonic() - self._since > _COMMIT_EVERY_S):
            self.commit()
        return self.transaction

    def commit(self) -> None:
        """Commits in the midst of a visit, and begins the next transaction."""
        self._save()
        self.transaction.commit(self.session.group_state(self.block, self.progress))
        self.transaction = self.session.store.transaction(self._group)
        self._since = time.monotonic()

    def end(self) -> None:
        """Commits what is left; goes on beside what comes next."""
        if self.progress == self.session.progress(self.block):
            return
        # Where steps followed an update and were good, one more forward for the last one would buy little.
        if self._new_updates and (self.progress.skipped_in_a_row or self._new_updates == 1):
            self.engine.look_ahead(self)
        self._save()
        self.transaction.commit_async(self.session.group_state(self.block, self.progress))

    def rewind(self, micro_batch: int | None) -> None:
        """Back to the last commit; with another micro-batch, durable before it takes effect."""
        self.transaction.discard()
        self.progress = self.session.progress(self.block)
        self.transaction = self.session.store.transaction(self._group)
        if micro_batch is not None:
            self.progress = self.progress.with_micro_batch(micro_batch)
            self.commit()
        self.trainer.enter(self.block)

    @property
    def _new_updates(self) -> int:
        return self.progress.updates - self.session.progress(self.block).updates

    def _save(self) -> None:
        """Writes the block back, unless every step since the last commit was skipped: then nothing changed."""
        if self._new_updates > 0:
            self.trainer.save(self.transaction)
