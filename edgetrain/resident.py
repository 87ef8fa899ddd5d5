"""The stages that are in memory now: flat buffers, with modules whose parameters are views into them.

Weights W, gradients G and, where they fit, the moments M and V of the trained stages, and the frozen ones, lie in one
buffer each; binding other stages to them allocates nothing. Moments that do not fit pass through two slices. In memory
all is fp32; what is stored in another type is converted on its way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from devices import Buffer, Device, Tier
from edgetrain.moves import Move, in_order, reading, writing
from edgetrain.optim import AdamW, round_to_bf16
from edgetrain.pieces import ITEM_BYTES, Piece, buffer_bytes, pieces, without_tiled
from edgetrain.schedule import Settings, Update
from edgetrain.stages import Stage
from edgetrain.store.layout import StageLayout, TensorSpec
from edgetrain.tiles import Tiles


@dataclass(frozen=True)
class Member:
    """A stage that is resident: its module (on meta until bound) and where its sections begin."""

    stage: Stage
    layout: StageLayout
    module: nn.Module
    offset: int
    held: StageLayout
    """Of what is in the buffers: all of ``layout``, or all but its tiled matrices."""

    @property
    def role(self) -> str:
        return "weight" if self.stage.trained else "frozen"

    @property
    def nbytes(self) -> int:
        """Of its section in memory."""
        return self.held.section_bytes(self.role)

    @property
    def is_stored_so(self) -> bool:
        """Whether the section is the same on disk and in memory."""
        return self.layout == self.held

    def holds(self, tensor: TensorSpec) -> bool:
        return self.held is self.layout.in_memory or any(one.name == tensor.name for one in self.held.tensors)


@dataclass(frozen=True)
class Part:
    """What the optimizer updates as one: a piece of a stage's trained tensor, flat views of it and of its gradient,
    None where they come in tiles, and of its moments m and v where they are resident."""

    member: Member
    piece: Piece
    weight: Tensor | None
    gradient: Tensor | None
    moments: Sequence[Tensor]


class Resident:
    """Buffers for one unit at a time, each a sequence of stages.

    Args:
        units: the layouts of all that gradients and moments are to be taken of here.
        holds: the layouts of all that are to be bound here; None: of the same.
        trains: whether there are gradients and moments.
        lender: its buffers for gradients, and for moments that pass through, serve here too.
        tiles: hold the larger matrices of the stages that they name, one tile at a time.

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
        tiles: Tiles | None = None,
    ) -> None:
        self.device = device
        self.moments_resident = moments_resident
        self.trains = trains
        self.tiles = tiles
        in_tiles = tiles.stages if tiles else ()
        sizes = buffer_bytes(units, moments_resident, in_tiles)
        if holds is not None:
            held = buffer_bytes(holds, moments_resident, in_tiles)
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

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def _buffers(self) -> Sequence[Buffer]:
        return self.weights, self.gradients, self.m, self.v, self.frozen

    def touch(self) -> None:
        """Make every page resident now, so that training cannot grow the process by them."""
        for buffer in self._buffers:
            buffer.touch()
        if self.tiles:
            self.tiles.touch()

    def touch_gradients(self) -> None:
        """Of these alone; weights that are only read may stay untouched."""
        self.gradients.touch()
        if self.tiles:
            self.tiles.touch(weights=False)

    def bind(self, stages: Sequence[tuple[Stage, StageLayout, nn.Module]]) -> None:
        """Point the modules' parameters into the buffers, in the order given."""
        self.members = []
        ends = {True: 0, False: 0}
        for stage, layout, module in stages:
            in_tiles = self.tiles is not None and stage.name in self.tiles.stages
            held = without_tiled(layout.in_memory) if in_tiles else layout.in_memory
            member = Member(stage, layout, module, ends[stage.trained], held)
            ends[stage.trained] += member.nbytes
            self.members.append(member)
            for tensor in layout.tensors:
                if not member.holds(tensor):
                    assert self.tiles is not None
                    self.tiles.bind(module, layout, tensor)
                    continue
                owner, _, name = tensor.name.rpartition(".")
                parameter = nn.Parameter(self._view(member, tensor), requires_grad=self.trains and stage.trained)
                if parameter.requires_grad:
                    parameter.grad = self._view(member, tensor, self.gradients)
                setattr(module.get_submodule(owner), name, parameter)
        self._parts = list(self._cut()) if self.trains else []

    def _cut(self) -> Iterator[Part]:
        for member in self.members:
            for piece in pieces(member.layout) if member.stage.trained else []:
                if not member.holds(piece.tensor):
                    yield Part(member, piece, None, None, [])
                    continue
                weight, gradient = (self._flat(buffer, member, piece) for buffer in (self.weights, self.gradients))
                moments = [self._flat(buffer, member, piece) for buffer in (self.m, self.v) if self.moments_resident]
                yield Part(member, piece, weight, gradient, moments)

    @staticmethod
    def _flat(buffer: Buffer, member: Member, piece: Piece) -> Tensor:
        start = member.offset + member.held.offset("weight", piece.tensor.name) + piece.first * ITEM_BYTES
        return buffer.tensor(torch.float32, start, (piece.num_elements,))

    def _view(self, member: Member, tensor: TensorSpec, buffer: Buffer | None = None) -> Tensor:
        """(shape) view of one tensor in W or the frozen buffer, or in ``buffer``, laid out as W."""
        buffer = buffer or (self.weights if member.stage.trained else self.frozen)
        offset = member.offset + member.held.offset(member.role, tensor.name)
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
        """Of all gradients in the buffer, padding (always zero) included."""
        return sum(member.nbytes for member in self.members if member.stage.trained)

    def flat_gradient(self) -> Tensor:
        """All gradients in the buffer, padding included, (elements,)."""
        return self.gradients.tensor(torch.float32, 0, (self.gradient_bytes // ITEM_BYTES,))

    def zero_gradients(self) -> None:
        """Of what is bound."""
        self.flat_gradient().zero_()
        self.forget_tiles()

    def gradient_norm(self) -> float:
        """Of what is bound: taken by pieces, which are the same wherever the gradients are."""
        norms = [torch.linalg.vector_norm(self._gradient(part)) for part in self._parts]
        return math.sqrt(sum(norm * norm for norm in torch.stack(norms).tolist()))  # one wait for a GPU, not many

    def _gradient(self, part: Part) -> Tensor:
        """(num_elements,), to be used until the next call."""
        if part.gradient is not None:
            return part.gradient
        assert self.tiles is not None
        return self.tiles.gradient(part.member.stage.name, part.piece)

    def load(self, read: Move) -> None:
        """Read the bound stages' current slots."""
        for member, role, buffer in self._sections():
            if role in ("m", "v") or member.is_stored_so:
                self.device.fill(buffer, member.offset, member.nbytes, in_order(read, member.stage.name, role))
                continue
            for tensor, offset, stored in self._apart(member, role):
                into = reading(read, member.stage.name, role, stored, tensor.dtype)
                self.device.fill(buffer, offset, math.prod(tensor.shape) * ITEM_BYTES, into)

    def save(self, write: Move) -> None:
        """Write what training changed to the idle slots; streamed moments are there already."""
        for member, role, buffer in self._sections():
            if not member.stage.trained:
                continue
            if role in ("m", "v") or member.is_stored_so:
                self.device.drain(buffer, member.offset, member.nbytes, in_order(write, member.stage.name, role))
                continue
            for tensor, offset, stored in self._apart(member, role):
                out = writing(write, member.stage.name, role, stored, tensor.dtype)
                self.device.drain(buffer, offset, math.prod(tensor.shape) * ITEM_BYTES, out)
            for start, nbytes in _gaps(member.layout, role):
                write(member.stage.name, role, memoryview(bytes(nbytes)), start)

    def _apart(self, member: Member, role: str) -> Iterator[tuple[TensorSpec, int, int]]:
        """(tensor, offset in the buffer, offset in the stored section) of each tensor in the buffer."""
        for tensor in filter(member.holds, member.layout.tensors):
            offset = member.offset + member.held.offset(role, tensor.name)
            yield tensor, offset, member.layout.offset(role, tensor.name)

    def _sections(self) -> Iterator[tuple[Member, str, Buffer]]:
        """(member, role, buffer) of everything that is resident as a whole."""
        for member in self.members:
            yield member, member.role, self.weights if member.stage.trained else self.frozen
            if member.stage.trained and self.moments_resident:
                yield member, "m", self.m
                yield member, "v", self.v

    def update(self, optimizer: AdamW, read: Move, write: Move, settings: Settings, scale: float = 1.0) -> None:
        """One optimizer step on everything that trains, with ``scale`` times the gradients."""
        if scale != 1.0:
            self.flat_gradient().mul_(scale)
        together: dict[Update, list[Part]] = {}
        for part in self._parts:
            at = settings(part.member.stage, part.piece.tensor)
            if self.moments_resident:
                together.setdefault(at, []).append(part)
                continue
            with self._in_memory(part, write, scale) as whole, self._streamed_moments(part, read, write) as moments:
                self._update_alike(optimizer, at, [whole], [moments])
        for at, parts in together.items():
            self._update_alike(optimizer, at, parts, [part.moments for part in parts])
        self.forget_tiles()

    def forget_tiles(self) -> None:
        """Gives back where the gradients of tiled matrices wait."""
        for member in self.members if self.tiles else ():
            assert self.tiles is not None
            self.tiles.forget(member.stage.name)

    @contextmanager
    def _in_memory(self, part: Part, write: Move, scale: float) -> Iterator[Part]:
        """The part itself, or for as long as this lasts one of a tiled matrix."""
        if part.weight is not None:
            yield part
            return
        assert self.tiles is not None
        member, piece = part.member, part.piece
        tensor = next(one for one in member.layout.tensors if one.name == piece.tensor.name)  # as it is stored
        weight = self.tiles.load(member.layout, tensor, piece.first, (piece.num_elements,))
        gradient = self._gradient(part)
        if scale != 1.0:
            gradient.mul_(scale)
        yield Part(member, piece, weight, gradient, [])
        self.tiles.store(member.layout, tensor, piece.first, piece.num_elements, write)

    @staticmethod
    def _update_alike(optimizer: AdamW, at: Update, parts: Sequence[Part], moments: Sequence[Sequence[Tensor]]) -> None:
        m, v = (list(one) for one in zip(*moments, strict=True))
        weights, gradients = [_known(part.weight) for part in parts], [_known(part.gradient) for part in parts]
        optimizer.update(weights, gradients, m, v, number=at.number, lr=at.lr, decays=at.decays)
        if at.rounding is not None:
            for part in parts:
                round_to_bf16(_known(part.weight), at.rounding, part.piece.offset // ITEM_BYTES)

    @contextmanager
    def _streamed_moments(self, part: Part, read: Move, write: Move) -> Iterator[Sequence[Tensor]]:
        """A piece's moments (num_elements,), read into the slices and then written to the idle slot."""
        stage, piece = part.member.stage.name, part.piece
        both = (("m", self.m), ("v", self.v))
        for role, buffer in both:
            self.device.fill(buffer, 0, piece.stored_bytes, in_order(read, stage, role, piece.offset))
        yield [buffer.tensor(torch.float32, 0, (piece.num_elements,)) for _, buffer in both]
        for role, buffer in both:
            self.device.drain(buffer, 0, piece.stored_bytes, in_order(write, stage, role, piece.offset))


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _gaps(layout: StageLayout, role: str) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the padding in a stored section."""
    ends = [layout.offset(role, tensor.name) for tensor in layout.tensors[1:]] + [layout.section_bytes(role)]
    for tensor, end in zip(layout.tensors, ends, strict=True):
        start = layout.offset(role, tensor.name) + tensor.nbytes
        if start < end:
            yield start, end - start
