"""AdamW over flat buffers, and the learning rate as a function of progress.

torch's fused kernel is called directly: constructing ``torch.optim.AdamW`` imports the compiler stack, some 70 MiB.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetrain.spec import OptimizerSpec


def learning_rate(spec: OptimizerSpec, step: int, total: int) -> float:
    """Of optimizer step ``step`` (from 0) out of ``total``: linear warm-up, then cosine to ``final_lr`` of the peak."""
    warmup = max(1, round(spec.warmup * total))
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return spec.lr * (spec.final_lr + (1 - spec.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class AdamW:
    """One update of AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self.spec = spec

    @torch.no_grad()
    def update(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        *,
        number: int,
        lr: float,
        decays: bool,
    ) -> None:
        """Updates ``weights``, ``m`` and ``v`` in place; the tensors are flat, those at one index of one size.

        Args:
            number: how many updates the parameters had with this one, from 1; decides the bias correction.
        """
        counter = torch.tensor(float(number), device=weights[0].device)
        torch._fused_adamw_(
            weights,
            gradients,
            m,
            v,
            [],
            [counter] * len(weights),
            lr=lr,
            beta1=self.spec.beta1,
            beta2=self.spec.beta2,
            weight_decay=self.spec.weight_decay if decays else 0.0,
            eps=self.spec.eps,
            amsgrad=False,
            maximize=False,
        )
