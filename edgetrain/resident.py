"""The stages that are in memory now: flat buffers, with modules whose parameters are views into them.

Weights W, gradients G and, where they fit, the moments M and V of the trained stages, and the frozen ones, lie in one
buffer each; binding other stages to them allocates nothing. Moments that do not fit pass through two slices. In memory
all is fp32; what is stored in another type is converted on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from devices import Buffer, Device, Tier
from edgetrain.optim import AdamW, round_to_bf16
from edgetrain.pieces import ITEM_BYTES, Piece, buffer_bytes, pieces
from edgetrain.randomness import Stream
from edgetrain.stages import Stage
from edgetrain.store.layout import ITEM_BYTES as STORED_ITEM_BYTES
from edgetrain.store.layout import StageLayout, TensorSpec

Move = Callable[[str, str, memoryview, int], None]
"""``read`` or ``write`` of a store or transaction: (stage, role, bytes, offset)."""

_CONVERTED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Member:
    """A stage that is resident: its module (on meta until bound) and where its sections begin."""

    stage: Stage
    layout: StageLayout
    module: nn.Module
    offset: int

    @property
    def role(self) -> str:
        return "weight" if self.stage.trained else "frozen"

    @property
    def nbytes(self) -> int:
        """Of its section in memory."""
        return self.layout.in_memory.section_bytes(self.role)


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
    """How one parameter is updated: learning rate, count of its updates from 1, and whether decay applies.

    ``rounding``: the stream that decides how new weights are rounded to bf16, where they are stored so.
    """

    lr: float
    number: int
    decays: bool
    rounding: Stream | None = None


Settings = Callable[[Stage, TensorSpec], Update]
"""How a parameter is updated, by its stage and name."""


class Resident:
    """Buffers for one unit at a time, each a sequence of stages.

    Args:
        units: the layouts of all that gradients and moments are to be taken of here.
        holds: the layouts of all that are to be bound here; None: of the same.
        trains: whether there are gradients and moments.
        lender: its buffers for gradients, and for moments that pass through, serve here too.

    Raises:
        DeviceOutOfMemory: the device has no room for them.
    """

    def __init__(
        self,
        device: Device,
        units: Sequence[Sequence[StageLayout]],
        moments_resident: bool,
        trains: bool = True,
        *,
        holds: Sequence[Sequence[StageLayout]] | None = None,
        lender: Resident | None = None,
    ) -> None:
        self.device = device
        self.moments_resident = moments_resident
        self.trains = trains
        sizes = buffer_bytes(units, moments_resident)
        if holds is not None:
            held = buffer_bytes(holds, moments_resident)
            sizes["weights"], sizes["frozen"] = held["weights"], held["frozen"]
        if not trains:
            sizes["gradients"] = sizes["moments"] = 0
        self.gradients: Buffer
        self.m: Buffer
        self.v: Buffer
        self.weights = device.buffer(sizes["weights"], Tier.DEVICE)
        self.frozen = device.buffer(sizes["frozen"], Tier.DEVICE)
        self.gradients = lender.gradients if lender else device.buffer(sizes["gradients"], Tier.DEVICE)
        if lender and not moments_resident:
            self.m, self.v = lender.m, lender.v
        else:
            self.m = device.buffer(sizes["moments"] // 2, Tier.DEVICE)
            self.v = device.buffer(sizes["moments"] // 2, Tier.DEVICE)
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
            ends[stage.trained] += member.nbytes
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
        offset = member.offset + member.layout.in_memory.offset(member.role, tensor.name)
        return buffer.tensor(torch.float32, offset, tensor.shape)

    def owns(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in one of the weight buffers."""
        storage = tensor.untyped_storage().data_ptr()
        return any(
            buffer.nbytes and storage == buffer.tensor(torch.uint8, 0, (1,)).untyped_storage().data_ptr()
            for buffer in (self.weights, self.frozen)
        )

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients of what is bound, padding (always zero) included."""
        return sum(member.nbytes for member in self.members if member.stage.trained)

    def flat_gradient(self) -> Tensor:
        """All gradients of what is bound, padding included, (elements,)."""
        return self.gradients.tensor(torch.float32, 0, (self.gradient_bytes // ITEM_BYTES,))

    def load(self, read: Move) -> None:
        """Read the bound stages' current slots."""
        for member, role, buffer in self._sections():
            if role in ("m", "v") or member.layout == member.layout.in_memory:
                self.device.fill(buffer, member.offset, member.nbytes, _in_order(read, member.stage.name, role))
                continue
            for tensor, offset, stored in self._converted(member, role):
                widened = _widened(read, member.stage.name, role, stored, tensor.dtype)
                self.device.fill(buffer, offset, tensor.nbytes * ITEM_BYTES // _item(tensor), widened)

    def save(self, write: Move) -> None:
        """Write what training changed to the idle slots; streamed moments are there already."""
        for member, role, buffer in self._sections():
            if not member.stage.trained:
                continue
            if role in ("m", "v") or member.layout == member.layout.in_memory:
                self.device.drain(buffer, member.offset, member.nbytes, _in_order(write, member.stage.name, role))
                continue
            for tensor, offset, stored in self._converted(member, role):
                narrowed = _narrowed(write, member.stage.name, role, stored)
                self.device.drain(buffer, offset, tensor.nbytes * ITEM_BYTES // _item(tensor), narrowed)
            for start, nbytes in _gaps(member.layout, role):
                write(member.stage.name, role, memoryview(bytes(nbytes)), start)

    def _converted(self, member: Member, role: str) -> Iterator[tuple[TensorSpec, int, int]]:
        """(tensor, offset in the buffer, offset in the stored section) of each tensor."""
        for tensor in member.layout.tensors:
            offset = member.offset + member.layout.in_memory.offset(role, tensor.name)
            yield tensor, offset, member.layout.offset(role, tensor.name)

    def _sections(self) -> Iterator[tuple[Member, str, Buffer]]:
        """(member, role, buffer) of everything that is resident as a whole."""
        for member in self.members:
            yield member, member.role, self.weights if member.stage.trained else self.frozen
            if member.stage.trained and self.moments_resident:
                yield member, "m", self.m
                yield member, "v", self.v

    def update(self, optimizer: AdamW, read: Move, write: Move, settings: Settings) -> None:
        """One optimizer step on everything that trains."""
        together: dict[Update, list[Part]] = {}
        for part in self._parts:
            at = settings(part.member.stage, part.piece.tensor)
            if self.moments_resident:
                together.setdefault(at, []).append(part)
            else:
                with self._streamed_moments(part, read, write) as moments:
                    self._update_alike(optimizer, at, [part], [moments])
        for at, parts in together.items():
            self._update_alike(optimizer, at, parts, [part.moments for part in parts])

    @staticmethod
    def _update_alike(optimizer: AdamW, at: Update, parts: Sequence[Part], moments: Sequence[Sequence[Tensor]]) -> None:
        m, v = (list(one) for one in zip(*moments, strict=True))
        weights, gradients = [part.weight for part in parts], [part.gradient for part in parts]
        optimizer.update(weights, gradients, m, v, number=at.number, lr=at.lr, decays=at.decays)
        if at.rounding is not None:
            for part in parts:
                round_to_bf16(part.weight, at.rounding, part.piece.offset // ITEM_BYTES)

    @contextmanager
    def _streamed_moments(self, part: Part, read: Move, write: Move) -> Iterator[Sequence[Tensor]]:
        """A piece's moments (num_elements,), read into the slices and then written to the idle slot."""
        stage, piece = part.member.stage.name, part.piece
        both = (("m", self.m), ("v", self.v))
        for role, buffer in both:
            self.device.fill(buffer, 0, piece.stored_bytes, _in_order(read, stage, role, piece.offset))
        yield [buffer.tensor(torch.float32, 0, (piece.num_elements,)) for _, buffer in both]
        for role, buffer in both:
            self.device.drain(buffer, 0, piece.stored_bytes, _in_order(write, stage, role, piece.offset))


def _in_order(move: Move, stage: str, role: str, offset: int = 0) -> Callable[[memoryview], None]:
    """Moves a stage's role, from ``offset`` on, by the pieces that a device hands out one after the other."""

    def piece(view: memoryview) -> None:
        nonlocal offset
        move(stage, role, view, offset)
        offset += len(view)

    return piece


def _item(tensor: TensorSpec) -> int:
    return STORED_ITEM_BYTES[tensor.dtype]


def widened(stored: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Stored bytes of type F32, BF16 or F16 as float32, exactly."""
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _widened(read: Move, stage: str, role: str, offset: int, dtype: str) -> Callable[[memoryview], None]:
    """Reads a tensor that is stored as ``dtype`` from ``offset`` on, as float32."""
    item = STORED_ITEM_BYTES[dtype]

    def piece(view: memoryview) -> None:
        nonlocal offset
        into = np.frombuffer(view, np.float32)
        for first in range(0, len(into), _CONVERTED_ELEMENTS):
            part = into[first : first + _CONVERTED_ELEMENTS]
            stored = np.empty(len(part) * item, np.uint8)
            read(stage, role, stored.data, offset)
            part[:] = widened(stored, dtype)
            offset += len(stored)

    return piece


def _narrowed(write: Move, stage: str, role: str, offset: int) -> Callable[[memoryview], None]:
    """Writes float32 values that bf16 can hold as bf16, from ``offset`` on."""

    def piece(view: memoryview) -> None:
        nonlocal offset
        values = np.frombuffer(view, np.uint32)
        for first in range(0, len(values), _CONVERTED_ELEMENTS):
            stored = (values[first : first + _CONVERTED_ELEMENTS] >> 16).astype(np.uint16)
            write(stage, role, stored.view(np.uint8).data, offset)
            offset += stored.nbytes

    return piece


def _gaps(layout: StageLayout, role: str) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the padding in a stored section."""
    ends = [layout.offset(role, tensor.name) for tensor in layout.tensors[1:]] + [layout.section_bytes(role)]
    for tensor, end in zip(layout.tensors, ends, strict=True):
        start = layout.offset(role, tensor.name) + tensor.nbytes
        if start < end:
            yield start, end - start
