"""What a model gives the trainers: its stages, and how each is built, one at a time.

A stage maps a ``Boundary`` to a ``Boundary``; the stem makes the first one from the batch, the head reads the last.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.noise import preconditioning
from edgetrain.spec import Spec


@dataclass(frozen=True)
class Boundary:
    """The named tensors between two stages. Both kinds are differentiable.

    ``carried`` is what a layer rewrites, each (micro_batch, tokens, width); ``context`` is what every layer reads,
    such as the condition.
    """

    carried: Mapping[str, Tensor]
    context: Mapping[str, Tensor]

    def advance(self, carried: Mapping[str, Tensor]) -> Boundary:
        return replace(self, carried=carried)


def network_input(z: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_in z, and c_noise (n,) (EDM, table 1), of z (n, ...) and sigma (n,)."""
    _, _, c_in = preconditioning(sigma, sigma_data)
    return c_in.view(-1, *[1] * (z.ndim - 1)) * z, sigma.log() / 4


class Layer(nn.Module, abc.ABC):
    """A transformer layer: boundary in, boundary with new carried tensors out."""

    @abc.abstractmethod
    def forward(self, boundary: Boundary) -> Boundary: ...


class Family(abc.ABC):
    """A model architecture, cut into stages. Modules are built on whatever device the caller has set as default:
    the engine builds them on meta and binds their parameters to its own buffers."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @abc.abstractmethod
    def build(self, kind: str) -> nn.Module:
        """The module of a stage: "stem", "head", or, a ``Layer``, "layer" or "adapter"."""


class Network(abc.ABC):
    """A model as exact training sees it, data and loss included. Modules are built as for a ``Family``.

    A model with an embedding finds the rows of its ``tokens`` in the batch, as "embedded" (n, tokens, width). A model
    with an output table returns from ``head`` what is multiplied with it, (n * tokens, width); then the batch has
    "targets" (n * tokens,) and "weights" (n * tokens,), and the loss is the weighted sum of cross-entropies.
    """

    guess = math.inf
    """The loss of guessing, where it is known."""

    @abc.abstractmethod
    def build(self, kind: str) -> nn.Module:
        """The module of a unit, by its kind: "stem", "head", or that of a layer."""

    @abc.abstractmethod
    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """Host arrays of examples ``first`` .. ``first + count - 1`` of the step's batch: a pure function."""

    @abc.abstractmethod
    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        """The first boundary of a micro-batch."""

    @abc.abstractmethod
    def layer(self, layer: nn.Module, boundary: Boundary) -> Boundary: ...

    @abc.abstractmethod
    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed loss of the micro-batch, weighted so that those of a batch add up to its mean; or as above."""

    @abc.abstractmethod
    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether weight decay applies to a parameter of a stage of this kind."""

    def prepare(self, module: nn.Module, stage_index: int, step: int, first: int) -> None:  # noqa: B027
        """Called before a layer runs on the micro-batch from example ``first`` on, for what is drawn anew each time."""

    def measured_as(self, kind: str) -> str:
        """The kind of layer whose memory and time stand for those of ``kind``."""
        return kind

    @property
    def examples(self) -> str:
        """What a batch counts."""
        return "examples"
