"""The stages that are in memory now: flat buffers, with modules whose parameters are views into them.

Weights W, gradients G and, where they fit, the moments M and V of the trained stages, and the frozen ones, lie in one
buffer each; binding a block to them allocates nothing. Moments that do not fit pass through two slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from devices import Buffer, Device, Tier
from edgetrain.optim import AdamW
from edgetrain.pieces import ITEM_BYTES, Piece, buffer_bytes, pieces
from edgetrain.stages import Stage
from edgetrain.store import Store, Transaction
from edgetrain.store.layout import StageLayout, TensorSpec

Move = Callable[[str, str, memoryview, int], None]
"""``read`` or ``write`` of a store or transaction: (stage, role, bytes, offset)."""


@dataclass(frozen=True)
class Member:
    """A stage of the resident block: its module (on meta until bound) and where its sections begin."""

    stage: Stage
    layout: StageLayout
    module: nn.Module
    offset: int

    @property
    def role(self) -> str:
        return "weight" if self.stage.trained else "frozen"


@dataclass(frozen=True)
class Update:
    """How one parameter is updated: learning rate, count of its updates from 1, and whether decay applies."""

    lr: float
    number: int
    decays: bool


class Resident:
    """Buffers for one block at a time. ``layouts`` are those of the largest block; without ``trains``, weights alone.

    Raises:
        DeviceOutOfMemory: the device has no room for them.
    """

    def __init__(
        self, device: Device, layouts: Sequence[StageLayout], moments_resident: bool, trains: bool = True
    ) -> None:
        self.device = device
        self.moments_resident = moments_resident
        self.trains = trains
        sizes = buffer_bytes(layouts, moments_resident)
        if not trains:
            sizes["gradients"] = sizes["moments"] = 0
        self.weights = device.buffer(sizes["weights"], Tier.DEVICE)
        self.gradients = device.buffer(sizes["gradients"], Tier.DEVICE)
        self.m = device.buffer(sizes["moments"] // 2, Tier.DEVICE)
        self.v = device.buffer(sizes["moments"] // 2, Tier.DEVICE)
        self.frozen = device.buffer(sizes["frozen"], Tier.DEVICE)
        self.members: list[Member] = []

    def touch(self) -> None:
        """Make every page resident now, so that training cannot grow the process by them."""
        for buffer in (self.weights, self.gradients, self.m, self.v, self.frozen):
            buffer.touch()

    def bind(self, stages: Sequence[tuple[Stage, StageLayout, nn.Module]]) -> None:
        """Point the modules' parameters into the buffers, in the order given."""
        self.members = []
        ends = {True: 0, False: 0}
        for stage, layout, module in stages:
            member = Member(stage, layout, module, ends[stage.trained])
            ends[stage.trained] += layout.section_bytes(member.role)
            self.members.append(member)
            for tensor in layout.tensors:
                owner, _, name = tensor.name.rpartition(".")
                parameter = nn.Parameter(self._view(member, tensor), requires_grad=self.trains and stage.trained)
                if parameter.requires_grad:
                    parameter.grad = self._view(member, tensor, self.gradients)
                setattr(module.get_submodule(owner), name, parameter)

    def _view(self, member: Member, tensor: TensorSpec, buffer: Buffer | None = None) -> Tensor:
        """(shape) view of one tensor in W or the frozen buffer, or in ``buffer``, laid out as W."""
        buffer = buffer or (self.weights if member.stage.trained else self.frozen)
        offset = member.offset + member.layout.offset(member.role, tensor.name)
        return buffer.tensor(torch.float32, offset, tensor.shape)

    def owns(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in one of the weight buffers."""
        storage = tensor.untyped_storage().data_ptr()
        return any(
            buffer.nbytes and storage == buffer.tensor(torch.uint8, 0, (1,)).untyped_storage().data_ptr()
            for buffer in (self.weights, self.frozen)
        )

    def flat_gradient(self) -> Tensor:
        """All gradients of the bound block, padding (always zero) included, (elements,)."""
        last = [member for member in self.members if member.stage.trained][-1]
        nbytes = last.offset + last.layout.section_bytes(last.role)
        return self.gradients.tensor(torch.float32, 0, (nbytes // ITEM_BYTES,))

    def load(self, store: Store) -> None:
        """Read the bound stages' current slots."""
        for member, role, buffer in self._sections():
            nbytes = member.layout.section_bytes(role)
            self.device.fill(buffer, member.offset, nbytes, _in_order(store.read, member.stage.name, role))

    def save(self, transaction: Transaction) -> None:
        """Write what training changed to the idle slots; streamed moments are there already."""
        for member, role, buffer in self._sections():
            if member.stage.trained:
                nbytes = member.layout.section_bytes(role)
                self.device.drain(buffer, member.offset, nbytes, _in_order(transaction.write, member.stage.name, role))

    def _sections(self) -> Iterator[tuple[Member, str, Buffer]]:
        """(member, role, buffer) of everything that is resident as a whole."""
        for member in self.members:
            yield member, member.role, self.weights if member.stage.trained else self.frozen
            if member.stage.trained and self.moments_resident:
                yield member, "m", self.m
                yield member, "v", self.v

    def update(
        self, optimizer: AdamW, transaction: Transaction, settings: Callable[[Stage, TensorSpec], Update]
    ) -> None:
        """One optimizer step on everything that trains.

        Args:
            settings: the learning rate, update count and decay of a parameter, by its stage and name.
        """
        for member in self.members:
            if not member.stage.trained:
                continue
            for piece in pieces(member.layout):
                at = settings(member.stage, piece.tensor)
                offset = member.offset + piece.offset
                weight = self.weights.tensor(torch.float32, offset, (piece.num_elements,))
                gradient = self.gradients.tensor(torch.float32, offset, (piece.num_elements,))
                with self._moments(member, piece, transaction) as (m, v):
                    optimizer.update(weight, gradient, m, v, update=at.number, lr=at.lr, decays=at.decays)

    @contextmanager
    def _moments(self, member: Member, piece: Piece, transaction: Transaction) -> Iterator[tuple[Tensor, Tensor]]:
        """A piece's moments (num_elements,): in place, or read into the slices and then written to the idle slot."""
        if self.moments_resident:
            offset = member.offset + piece.offset
            yield (
                self.m.tensor(torch.float32, offset, (piece.num_elements,)),
                self.v.tensor(torch.float32, offset, (piece.num_elements,)),
            )
            return
        for role, buffer in (("m", self.m), ("v", self.v)):
            read = _in_order(transaction.read, member.stage.name, role, piece.offset)
            self.device.fill(buffer, 0, piece.stored_bytes, read)
        yield (
            self.m.tensor(torch.float32, 0, (piece.num_elements,)),
            self.v.tensor(torch.float32, 0, (piece.num_elements,)),
        )
        for role, buffer in (("m", self.m), ("v", self.v)):
            write = _in_order(transaction.write, member.stage.name, role, piece.offset)
            self.device.drain(buffer, 0, piece.stored_bytes, write)


def _in_order(move: Move, stage: str, role: str, offset: int = 0) -> Callable[[memoryview], None]:
    """Moves a stage's role, from ``offset`` on, by the pieces that a device hands out one after the other."""

    def piece(view: memoryview) -> None:
        nonlocal offset
        move(stage, role, view, offset)
        offset += len(view)

    return piece
