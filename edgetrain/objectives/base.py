"""What a training objective tells the engine: which blocks to visit, what each is made of, and its loss."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgetrain.activations import Activations
from edgetrain.models.base import Layer


@dataclass(frozen=True)
class Block:
    """The modules of one block, bound to the weights that are resident now. ``codebook``: where its rows are noised."""

    index: int
    stem: nn.Module
    layers: Sequence[Layer]
    head: nn.Module
    codebook: nn.Module | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """In the order of ``stages_of_block``."""
        return [*([] if self.codebook is None else [self.codebook]), self.stem, *self.layers, self.head]

    @property
    def rows(self) -> Tensor:
        """The codebook's unit rows, (classes, width) or (vocab_size, width)."""
        assert self.codebook is not None
        rows: Tensor = self.codebook()
        return rows


class Objective(abc.ABC):
    """A way to train blocks. The engine owns memory, disk and time; the objective owns the mathematics."""

    @property
    @abc.abstractmethod
    def guess(self) -> float:
        """The loss of guessing."""

    @abc.abstractmethod
    def draw(self, block: int, step: int, first: int, count: int) -> Mapping[str, Any]:
        """Host arrays that examples ``first`` .. ``first + count - 1`` of the step's batch need: a pure function."""

    @abc.abstractmethod
    def loss(self, block: Block, draw: Mapping[str, Tensor], activations: Activations) -> Tensor:
        """The summed loss of the examples divided by the whole batch size, so that micro-batches add up."""
