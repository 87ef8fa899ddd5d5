"""AdamW over flat buffers, and the learning rate as a function of progress.

torch's fused kernel is called directly: constructing ``torch.optim.AdamW`` imports the compiler stack, some 70 MiB.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edgetrain.randomness import Stream, words
from edgetrain.spec import OptimizerSpec

_ELEMENTS_PER_SAMPLE = 16  # 16 bits for each, of four 64-bit words


def learning_rate(spec: OptimizerSpec, step: int, total: int) -> float:
    """Of optimizer step ``step`` (from 0) out of ``total``: linear warm-up, then as ``spec.schedule`` says."""
    warmup = max(1, round(spec.warmup * total)) if spec.warmup else 0
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return spec.lr * (spec.final_lr + (1 - spec.final_lr) * shape[spec.schedule])


@torch.no_grad()
def round_to_bf16(values: Tensor, stream: Stream, first: int) -> None:
    """Rounds float32 ``values`` (n,) in place to neighbours that bf16 holds, up or down at random such that the mean
    is kept. Element i is rounded by the 16 bits of number ``first`` + i of the stream, however elements are split."""
    start = first // _ELEMENTS_PER_SAMPLE
    samples = -(-(first + len(values)) // _ELEMENTS_PER_SAMPLE) - start
    drawn = words(stream, start, samples, _ELEMENTS_PER_SAMPLE // 4).view(np.uint16).reshape(-1)
    low = drawn[first - start * _ELEMENTS_PER_SAMPLE :][: len(values)].astype(np.int32)
    bits = values.view(torch.int32)
    bits += torch.from_numpy(low).to(values.device)
    bits &= -65536


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
