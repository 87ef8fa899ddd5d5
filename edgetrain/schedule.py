"""How parameters are updated, as a function of progress alone. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgetrain.parameters import decays
from edgetrain.randomness import Stream
from edgetrain.session import BlockProgress, Session
from edgetrain.spec import OptimizerSpec
from edgetrain.stages import Stage
from edgetrain.store.layout import TensorSpec


def learning_rate(spec: OptimizerSpec, step: int, total: int) -> float:
    """Of optimizer step ``step`` (from 0) out of ``total``: linear warm-up, then as ``spec.schedule`` says."""
    warmup = max(1, round(spec.warmup * total)) if spec.warmup else 0
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return spec.lr * (spec.final_lr + (1 - spec.final_lr) * shape[spec.schedule])


@dataclass(frozen=True)
class Update:
    """How one parameter is updated: learning rate, count of its updates from 1, and whether decay applies.

    ``rounding``: the stream that decides how new weights are rounded to bf16, where they are stored so.
    """

    lr: float
    number: int
    decays: bool
    rounding: Stream | None = None


Settings = Callable[[Stage, TensorSpec], Update]
"""How a parameter is updated, by its stage and name."""


def block_settings(session: Session, block: int, progress: BlockProgress) -> Settings:
    """How each parameter is updated in the step of a block after ``progress``: a private or only block's own step
    decides, for a stage that several blocks share the progress of all of them."""
    spec = session.spec
    total = spec.train.steps
    own_lr = learning_rate(spec.optimizer, progress.step, total)
    others = (session.progress(other) for other in range(spec.num_blocks) if other != block)
    everywhere = [progress, *others] if spec.diffusion_blocks.has_shared else [progress]
    all_lr = learning_rate(spec.optimizer, sum(p.step for p in everywhere), total * spec.num_blocks)
    all_updates = sum(p.updates for p in everywhere)

    def settings(stage: Stage, tensor: TensorSpec) -> Update:
        is_decayed = decays(tensor.name)
        if stage.sharing == "shared":
            return Update(all_lr, all_updates + 1, is_decayed)
        return Update(own_lr, progress.updates + 1, is_decayed)

    return settings
