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
class Part:
    """What the optimizer updates as one: a piece of a stage's trained tensor, flat views of it and of its gradient,
    and of its moments m and v where they are resident."""

    member: Member
    piece: Piece
    weight: Tensor
    gradient: Tensor
    moments: Sequence[Tensor]


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
        self._parts: list[Part] = []

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
        self._parts = list(self._cut()) if self.trains else []

    def _cut(self) -> Iterator[Part]:
        for member in self.members:
            for piece in pieces(member.layout) if member.stage.trained else []:
                weight, gradient = (self._flat(buffer, member, piece) for buffer in (self.weights, self.gradients))
                moments = [self._flat(buffer, member, piece) for buffer in (self.m, self.v) if self.moments_resident]
                yield Part(member, piece, weight, gradient, moments)

    @staticmethod
    def _flat(buffer: Buffer, member: Member, piece: Piece) -> Tensor:
        return buffer.tensor(torch.float32, member.offset + piece.offset, (piece.num_elements,))

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
        together: dict[Update, list[Part]] = {}
        for part in self._parts:
            at = settings(part.member.stage, part.piece.tensor)
            if self.moments_resident:
                together.setdefault(at, []).append(part)
            else:
                with self._streamed_moments(part, transaction) as moments:
                    self._update_alike(optimizer, at, [part], [moments])
        for at, parts in together.items():
            self._update_alike(optimizer, at, parts, [part.moments for part in parts])

    @staticmethod
    def _update_alike(optimizer: AdamW, at: Update, parts: Sequence[Part], moments: Sequence[Sequence[Tensor]]) -> None:
        m, v = (list(one) for one in zip(*moments, strict=True))
        weights, gradients = [part.weight for part in parts], [part.gradient for part in parts]
        optimizer.update(weights, gradients, m, v, number=at.number, lr=at.lr, decays=at.decays)

    @contextmanager
    def _streamed_moments(self, part: Part, transaction: Transaction) -> Iterator[Sequence[Tensor]]:
        """A piece's moments (num_elements,), read into the slices and then written to the idle slot."""
        stage, piece = part.member.stage.name, part.piece
        both = (("m", self.m), ("v", self.v))
        for role, buffer in both:
            self.device.fill(buffer, 0, piece.stored_bytes, _in_order(transaction.read, stage, role, piece.offset))
        yield [buffer.tensor(torch.float32, 0, (piece.num_elements,)) for _, buffer in both]
        for role, buffer in both:
            self.device.drain(buffer, 0, piece.stored_bytes, _in_order(transaction.write, stage, role, piece.offset))


def _in_order(move: Move, stage: str, role: str, offset: int = 0) -> Callable[[memoryview], None]:
    """Moves a stage's role, from ``offset`` on, by the pieces that a device hands out one after the other."""

    def piece(view: memoryview) -> None:
        nonlocal offset
        move(stage, role, view, offset)
        offset += len(view)

    return piece
