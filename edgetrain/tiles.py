"""Matrices of layers that are never in memory as a whole, for layers that are too large: read a tile at a time, their
gradients added up where they wait, and updated a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from devices import Buffer, Device, Tier
from edgetrain.models.matrices import Matrix, add_product
from edgetrain.moves import Move, reading, writing
from edgetrain.pieces import ITEM_BYTES, Piece, tile_bytes
from edgetrain.store.layout import ITEM_BYTES as STORED_ITEM_BYTES
from edgetrain.store.layout import StageLayout, TensorSpec

Key = tuple[str, str]
"""(stage, tensor)."""


class Tiles:
    """Room for one tile of a weight and one of a gradient.

    Args:
        layouts: of the stages whose larger matrices (``pieces.tiled``) come in tiles.
        tier: where gradients wait.
        read: bytes of weights as the steps before have left them.
    """

    def __init__(self, device: Device, layouts: Sequence[StageLayout], tier: Tier, read: Move) -> None:
        self.stages = frozenset(layout.name for layout in layouts)
        self._device, self._tier, self._read = device, tier, read
        weight_bytes, gradient_bytes = tile_bytes(layouts)
        self._weight = device.buffer(weight_bytes, Tier.DEVICE)
        self._gradient = device.buffer(gradient_bytes, Tier.DEVICE)
        self._waiting: dict[Key, Buffer] = {}
        self._begun: set[tuple[Key, int]] = set()
        self.moved_bytes = 0
        """Of gradients, to where they wait."""

    def touch(self, weights: bool = True) -> None:
        """Make every page resident now."""
        self._gradient.touch()
        if weights:
            self._weight.touch()

    def bind(self, module: nn.Module, layout: StageLayout, tensor: TensorSpec) -> None:
        """Has a linear map multiply with the tensor as it is stored."""
        owner, _, name = tensor.name.rpartition(".")
        linear = module.get_submodule(owner)
        linear.matrix = _Streamed(self, layout, tensor)  # type: ignore[assignment]
        empty = torch.empty(0, device=self._device.torch_device)
        setattr(linear, name, nn.Parameter(empty, requires_grad=layout.trained))

    def load(self, layout: StageLayout, tensor: TensorSpec, first: int, shape: Sequence[int]) -> Tensor:
        """Elements of a tensor from number ``first`` on, of that shape, to be used until the next call."""
        role = "weight" if layout.trained else "frozen"
        offset = layout.offset(role, tensor.name) + first * STORED_ITEM_BYTES[tensor.dtype]
        found = self._weight.tensor(torch.float32, 0, shape)
        self._device.fill(self._weight, 0, found.nbytes, reading(self._read, layout.name, role, offset, tensor.dtype))
        return found

    def store(self, layout: StageLayout, tensor: TensorSpec, first: int, count: int, write: Move) -> None:
        """Writes what ``load`` gave, and was changed, back."""
        offset = layout.offset("weight", tensor.name) + first * STORED_ITEM_BYTES[tensor.dtype]
        self._device.drain(
            self._weight, 0, count * ITEM_BYTES, writing(write, layout.name, "weight", offset, tensor.dtype)
        )

    def add(self, key: Key, tensor: TensorSpec, first: int, a: Tensor, b: Tensor) -> None:
        """Adds a b to rows of a tensor's gradient, from element ``first`` on."""
        if key not in self._waiting:
            self._waiting[key] = self._device.buffer(ITEM_BYTES * tensor.shape[0] * tensor.shape[1], self._tier)
        gradient = self._gradient.tensor(torch.float32, 0, (a.shape[0], b.shape[1]))
        if (key, first) in self._begun:
            self._device.copy_async(
                self._waiting[key], self._gradient, gradient.nbytes, source_offset=first * ITEM_BYTES
            ).wait()
        else:
            gradient.zero_()
            self._begun.add((key, first))
        add_product(gradient, a, b)
        self._device.copy_async(
            self._gradient, self._waiting[key], gradient.nbytes, destination_offset=first * ITEM_BYTES
        ).wait()
        self.moved_bytes += gradient.nbytes

    def gradient(self, stage: str, piece: Piece) -> Tensor:
        """Of a piece (num_elements,), to be used until the next call."""
        found = self._gradient.tensor(torch.float32, 0, (piece.num_elements,))
        waiting, offset = self._waiting[stage, piece.tensor.name], piece.first * ITEM_BYTES
        self._device.copy_async(waiting, self._gradient, found.nbytes, source_offset=offset).wait()
        return found

    def forget(self, stage: str) -> None:
        """The stage's gradients are zero again."""
        for key in [one for one in self._waiting if one[0] == stage]:
            self._waiting.pop(key).release()
        self._begun = {one for one in self._begun if one[0][0] != stage}


class _Streamed(Matrix):
    """A stored tensor."""

    def __init__(self, tiles: Tiles, layout: StageLayout, tensor: TensorSpec) -> None:
        super().__init__((tensor.shape[0], tensor.shape[1]))
        self._tiles, self._layout, self._tensor = tiles, layout, tensor

    def tile(self, first: int, count: int) -> Tensor:
        columns = self.shape[1]
        return self._tiles.load(self._layout, self._tensor, first * columns, (count, columns))

    def add(self, first: int, a: Tensor, b: Tensor) -> None:
        key = (self._layout.name, self._tensor.name)
        self._tiles.add(key, self._tensor, first * self.shape[1], a, b)
