"""Computation in bfloat16 under float32 weights, gradients and boundaries (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from devices import Device
from edgetrain.errors import UsageError
from edgetrain.models.base import Boundary, Network
from edgetrain.spec import Spec


def in_precision(network: Network, spec: Spec, device: Device) -> Network:
    """The network as it computes by ``exact.compute``.

    Raises:
        UsageError: the device cannot.
    """
    if spec.exact.compute == "fp32":
        return network
    if not device.capabilities.bfloat16:
        raise UsageError(f"a device of kind {device.kind} does not compute in bf16", 'Set exact.compute to "fp32".')
    return _Bf16(network, device.torch_device.type)


class _Bf16(Network):
    """Products in bfloat16, as torch's autocast has them. What goes from one unit to the next is float32, so that a
    boundary has the same size and type wherever it waits."""

    def __init__(self, network: Network, device_type: str) -> None:
        self._network, self._device_type = network, device_type
        self.guess = network.guess

    def _computing(self) -> AbstractContextManager[None]:
        # No cache: it would hold a second copy of the weights, and of values that the window then changes.
        return torch.autocast(self._device_type, torch.bfloat16, cache_enabled=False)

    def build(self, kind: str) -> nn.Module:
        return self._network.build(kind)

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        return self._network.draw(step, first, count)

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        with self._computing():
            entered = self._network.enter(stem, batch)
        return Boundary(_wide(entered.carried), _wide(entered.context))

    def layer(self, layer: nn.Module, boundary: Boundary) -> Boundary:
        with self._computing():
            left = self._network.layer(layer, boundary)
        return left.advance(_wide(left.carried))

    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        with self._computing():
            return self._network.head(head, boundary, batch).float()

    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        return self._network.decays(kind, name, shape)

    def prepare(self, module: nn.Module, stage_index: int, step: int, first: int) -> None:
        self._network.prepare(module, stage_index, step, first)

    def measured_as(self, kind: str) -> str:
        return self._network.measured_as(kind)


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
