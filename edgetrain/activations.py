"""What becomes of the tensors that autograd saves between forward and backward: kept, recomputed, or offloaded.

The three give equal gradients, bit for bit: the same kernels run on the same values in the same order. They differ
in memory, time and bytes moved; the plan chooses, and ``--activations`` forces one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from devices import Device, Offloaded, Tier
from edgetrain.models.base import Boundary

Run = Callable[[Boundary], Boundary]
"""A layer."""

# Smaller tensors stay: they cost more to move than to hold.
SMALLEST_OFFLOADED_BYTES = 16384


class Activations(abc.ABC):
    """Runs a layer so that its backward pass is possible. ``offloaded_bytes`` counts what was moved out."""

    offloaded_bytes = 0

    @abc.abstractmethod
    def run(self, layer: Run, boundary: Boundary) -> Boundary: ...


class Keep(Activations):
    """Ordinary autograd: everything saved stays in device memory.

    ``passing``: weights do not. They are back in their place when backward comes; of that autograd, which counts how
    often a tensor was written, knows nothing, and must not be asked.
    """

    def __init__(self, passing: bool = False) -> None:
        self._passing = passing

    def run(self, layer: Run, boundary: Boundary) -> Boundary:
        if not self._passing:
            return layer(boundary)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved):
            return layer(boundary)


class Recompute(Activations):
    """Only the boundary is kept; the layer runs once more in the backward pass (Chen et al., arXiv 1604.06174)."""

    def run(self, layer: Run, boundary: Boundary) -> Boundary:
        carried, context = dict(boundary.carried), dict(boundary.context)
        # Autograd calls the backward of a function only if some input wants a gradient; with a frozen stem none would.
        anchor = torch.empty(0, requires_grad=True)
        names = (tuple(carried), tuple(context))
        outputs = _Recomputed.apply(layer, names, anchor, *carried.values(), *context.values())
        return boundary.advance(dict(zip(carried, outputs, strict=True)))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Run, names: tuple[tuple[str, ...], ...], anchor: Tensor, *inputs: Tensor) -> Any:
        ctx.layer, ctx.names = layer, names
        ctx.save_for_backward(*inputs)
        return tuple(layer(_boundary(names, inputs)).carried.values())

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> Any:
        inputs = [
            saved.detach().requires_grad_(needed)
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.layer(_boundary(ctx.names, inputs)).carried.values()
            # A sum of products instead of backward(gradient), whose first call imports sympy: some 35 MiB.
            total = sum((y * g).sum() for y, g in zip(outputs, output_gradients, strict=True))
        total.backward()
        return (None, None, None, *(x.grad for x in inputs))


def _boundary(names: tuple[tuple[str, ...], ...], tensors: Any) -> Boundary:
    carried, context = names
    tensors = list(tensors)
    return Boundary(dict(zip(carried, tensors, strict=False)), dict(zip(context, tensors[len(carried) :], strict=True)))


class Offload(Activations):
    """Saved tensors move to a slower tier: host memory beside a device, else the disk.

    Args:
        resident: tells whether a tensor lies in a buffer that stays anyway (a weight).
    """

    def __init__(self, device: Device, tier: Tier, resident: Callable[[Tensor], bool]) -> None:
        self.device, self.tier, self.resident = device, tier, resident
        self.offloaded_bytes = 0

    def run(self, layer: Run, boundary: Boundary) -> Boundary:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return layer(boundary)

    def _pack(self, tensor: Tensor) -> Tensor | Offloaded:
        if tensor.nbytes < SMALLEST_OFFLOADED_BYTES or self.resident(tensor):
            return tensor
        moved = self.device.offload(tensor, self.tier)
        self.offloaded_bytes += moved.nbytes
        return moved

    @staticmethod
    def _unpack(packed: Tensor | Offloaded) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.restore()
