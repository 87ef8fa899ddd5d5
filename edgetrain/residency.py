"""The units that are in memory now, in exact training: some for good, the others one at a time through a window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from devices import Device, Tier
from edgetrain.models.base import Network
from edgetrain.resident import Resident
from edgetrain.spec import Spec
from edgetrain.stages import ExactStages, Stage, Unit, rows_of_chunk
from edgetrain.store import Transaction
from edgetrain.store.layout import StageLayout
from edgetrain.table import Rows, gather
from edgetrain.tiles import Tiles


class Reads(Protocol):
    """The part of a store that a trainer uses."""

    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None: ...

    def prefetch(self, stages: Iterable[str]) -> None: ...


class Source(Protocol):
    """The part of a session that a trainer uses."""

    @property
    def spec(self) -> Spec: ...

    @property
    def store(self) -> Reads: ...

    def layout(self, stage: Stage) -> StageLayout: ...


class Residency:
    """Weights of a model's units, and the buffers of their gradients and moments.

    Everything is pinned with ``resident``, its moments too; else the weights of ``kept``, and the others pass through
    ``window``, with ``tiled_to`` the larger matrices of layers tile by tile: their gradients wait in that tier.
    ``transaction``: where the steps before this one have left what they changed.
    """

    def __init__(
        self,
        source: Source,
        device: Device,
        network: Network,
        stages: ExactStages,
        *,
        resident: bool,
        kept: Sequence[Unit],
        tiled_to: Tier | None = None,
    ) -> None:
        self._source, self._device, self._network = source, device, network
        self._stages, self._resident = stages, resident
        self.transaction: Transaction | None = None
        units = stages.units
        self._layouts = {stage.name: source.layout(stage) for stage in stages.stages}
        passing = [] if resident else [self._of(unit) for unit in units]  # kept ones too, once unpinned
        in_tiles = [self._layouts[stage.name] for stage in stages.in_tiles]
        tiles = Tiles(device, in_tiles, tiled_to, self._read) if tiled_to is not None else None
        self.window = Resident(device, [self._of(unit) for unit in units], False, holds=passing, tiles=tiles)
        self._skeletons: dict[str, nn.Module] = {}
        self._pinned = {
            unit: (Resident(device, [self._of(unit)], resident, lender=self.window), self._build(unit.kind))
            for unit in (units if resident else kept)
        }
        for unit, (held, module) in self._pinned.items():
            self._bind(held, unit, module)
        self._in_window: Unit | None = None

    def _of(self, unit: Unit) -> list[StageLayout]:
        return [self._layouts[stage.name] for stage in unit.stages]

    def _build(self, kind: str) -> nn.Module:
        if kind.startswith(("embedding", "output")):
            return Rows()
        with torch.device("meta"):
            return self._network.build(kind)

    def _bind(self, resident: Resident, unit: Unit, module: nn.Module) -> None:
        resident.bind([(stage, self._layouts[stage.name], module) for stage in unit.stages])

    def _read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        """Bytes of a stage as the steps before this one have left them."""
        source = self.transaction if role != "frozen" and self.transaction is not None else self._source.store
        source.read(stage, role, into, offset)

    def touch(self) -> None:
        """Makes every page resident now, so that training cannot grow the process by them."""
        self.window.touch()
        for held, _ in self._pinned.values():
            held.touch()

    def enter(self) -> None:
        """Begins with what is committed."""
        self.transaction = None
        self.forget()
        for held, _ in self._pinned.values():
            held.load(self._read)

    def save(self, transaction: Transaction) -> None:
        """Writes what is pinned."""
        for held, _ in self._pinned.values():
            held.save(transaction.write)

    def forget(self) -> None:
        """The window's content is no unit's any more."""
        self._in_window = None

    def pins(self, unit: Unit) -> bool:
        return unit in self._pinned

    def unpin(self) -> bool:
        """Lets all units pass that can; whether some were pinned. What they had learnt since a commit is lost."""
        if self._resident or not self._pinned:
            return False
        self._pinned.clear()
        return True

    def owns(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies among the weights."""
        return self.window.owns(tensor) or any(held.owns(tensor) for held, _ in self._pinned.values())

    def hold(self, unit: Unit) -> tuple[Resident, nn.Module]:
        """The unit's buffers and module, its weights as the transaction has them, until another unit is held."""
        if unit in self._pinned:
            return self._pinned[unit]
        if (module := self._skeletons.get(unit.kind)) is None:
            module = self._skeletons[unit.kind] = self._build(unit.kind)
        if self._in_window is not unit:
            self._in_window = None
            self._bind(self.window, unit, module)
            self.window.load(self._read)
            self._in_window = unit
        return self.window, module

    def ahead(self, units: Sequence[Unit]) -> None:
        """Reads the next unit into the system's cache, if it has to be loaded."""
        for unit in units[:1]:
            if unit not in self._pinned:
                self._source.store.prefetch(stage.name for stage in unit.stages)

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens (n, length) -> their rows of the embedding (n, length, width)."""
        chunks = self._stages.embedding
        if chunks[0] not in self._pinned:
            read = [(unit.stages[0].name, self._layouts[unit.stages[0].name]) for unit in chunks]
            return gather(tokens.cpu().numpy(), read, self._read).to(self._device.torch_device)
        weights = [rows_of(self._pinned[unit][1]).detach() for unit in chunks]
        flat, width = tokens.flatten(), weights[0].shape[1]
        out = weights[0].new_empty(len(flat), width)
        for number, rows in enumerate(weights):
            first_token = number * rows_of_chunk(width)
            inside = (flat >= first_token) & (flat < first_token + len(rows))
            out[inside] = rows[flat[inside] - first_token]
        return out.unflatten(0, tokens.shape)


def rows_of(module: nn.Module) -> nn.Parameter:
    """Those of a table's chunk (rows, width)."""
    assert isinstance(module, Rows)
    return module.weight
