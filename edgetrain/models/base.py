"""What a model family gives the engine: its stages, and how each is built, one at a time.

A stage maps a ``Boundary`` to a ``Boundary``; the stem makes the first one from the batch, the head reads the last.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

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
    def build_stem(self) -> nn.Module: ...

    @abc.abstractmethod
    def build_layer(self) -> Layer: ...

    @abc.abstractmethod
    def build_head(self) -> nn.Module: ...

    @abc.abstractmethod
    def initialise(self, stage_kind: str, name: str, normal: NDArray[np.float32]) -> NDArray[np.float32]:
        """Initial values of parameter ``name`` of a "stem", "layer" or "head", from unit normals of its shape."""

    @abc.abstractmethod
    def decays(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether weight decay applies to the parameter."""
