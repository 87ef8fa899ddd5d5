"""AdamW over flat buffers.

torch's fused kernel is called directly: constructing ``torch.optim.AdamW`` imports the compiler stack, some 70 MiB.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from devices import Device
from devices.limits import is_out_of_memory
from edgetrain.randomness import Stream, words
from edgetrain.spec import OptimizerSpec

_ELEMENTS_PER_SAMPLE = 16  # 16 bits for each, of four 64-bit words


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


def warm_up_kernels(device: Device) -> None:
    """Runs what a step needs beside forward and backward once: the norm, the optimizer, a failing allocation."""
    small = [torch.zeros(16, device=device.torch_device) for _ in range(4)]
    torch.linalg.vector_norm(small[0]).item()
    AdamW(OptimizerSpec()).update(*([one] for one in small), number=1, lr=0.0, decays=True)
    try:  # the code of the error path is read in now, not when memory is short
        torch.empty(1 << 50, dtype=torch.uint8)
    except RuntimeError as error:
        is_out_of_memory(error)
