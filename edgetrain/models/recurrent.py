"""A language model with a core that runs again and again (Huginn, arXiv 2502.05171): prelude, core, coda.

The prelude makes e of the tokens; the core maps a state s, beginning with s = adapter([s, e]), to a new one; the coda
reads the last state. Trained as a whole the state starts as noise and the core runs several times. By DiffusionBlocks
(arXiv 2506.14202) one run is one step of denoising: the state given to it is made of z_i = y_i + sigma * eps with
y_i the codebook's row of the token after token i, so that training needs no more than one run. All is causal: state i
sees those before it, whose targets are tokens that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.data.batches import TextBatches
from edgetrain.models.attention import attend
from edgetrain.models.base import Boundary, Family
from edgetrain.models.base import Layer as BaseLayer
from edgetrain.models.text import TextHead, TextNetwork, TextStem, TokenLayer
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.spec import Spec, TextModelSpec


class Layer(TokenLayer):
    """One of the core."""

    def causal(self, x: Tensor, condition: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        return self.stream(x, condition, partial(attend))

    def forward(self, boundary: Boundary) -> Boundary:
        return boundary.advance({"state": self.causal(boundary.carried["state"], boundary.context["condition"])})


class Adapter(BaseLayer):
    """Where the core begins: what the prelude made comes to the state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width, bias=False)

    def forward(self, boundary: Boundary) -> Boundary:
        both = torch.cat([boundary.carried["state"], boundary.context["injected"]], -1)
        return boundary.advance({"state": self.linear(both)})


class Stem(TextStem):
    """Tokens and the prelude."""

    def __init__(self, model: TextModelSpec, is_timed: bool) -> None:
        super().__init__(model, num_tokens=model.vocab_size, is_timed=is_timed, has_constant=True)
        self.prelude = nn.ModuleList(Layer(model) for _ in range(model.prelude))

    def injected(self, tokens: Tensor) -> Tensor:
        """e (n, tokens, width) of tokens (n, tokens)."""
        e = self.embedded(tokens)
        for layer in self.prelude:
            e = layer.causal(e, self.constant)  # type: ignore[operator]
        return e

    def forward(self, tokens: Tensor, state: Tensor, c_noise: Tensor | None = None) -> Boundary:
        """tokens (n, tokens), state (n, tokens, width), and c_noise (n,) where the state is noisy by that."""
        condition = self.constant if c_noise is None else self.condition(c_noise)
        return Boundary({"state": state}, {"injected": self.injected(tokens), "condition": condition})


class Head(TextHead):
    """The coda and the logits."""

    def __init__(self, model: TextModelSpec) -> None:
        super().__init__(model)
        self.coda = nn.ModuleList(Layer(model) for _ in range(model.coda))

    def network_output(self, boundary: Boundary) -> Tensor:
        """F, (n, tokens, width)."""
        state, condition = boundary.carried["state"], boundary.context["condition"]
        for layer in self.coda:
            state = layer.causal(state, condition)  # type: ignore[operator]
        return state


class Recurrent(Family):
    """Stages of the only block."""

    def build(self, kind: str) -> nn.Module:
        model = self.spec.text_model
        made = {"stem": lambda: Stem(model, True), "head": lambda: Head(model), "adapter": lambda: Adapter(model.width)}
        return made.get(kind, lambda: Layer(model))()


class RecurrentNetwork(TextNetwork):
    """The same transformer trained as a whole, back through the loops."""

    def __init__(self, spec: Spec, batches: TextBatches | None) -> None:
        super().__init__(spec, Recurrent(spec), batches)

    def build(self, kind: str) -> nn.Module:
        return Stem(self.model, False) if kind == "stem" else self.family.build(kind)

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """With the "state" that the core begins with, (n, length, width)."""
        drawn = super().draw(step, first, count)
        stream = Stream(self.spec.train.seed, Purpose.NOISE, 0, step)
        return {**drawn, "state": first_state(stream, first, drawn["tokens"].shape, self.model.width)}

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        boundary: Boundary = stem(batch["tokens"], batch["state"])
        return boundary

    def logits(self, head: nn.Module, boundary: Boundary, last: bool = False) -> Tensor:
        output = head.network_output(boundary)  # type: ignore[operator]
        logits: Tensor = head(output[:, -1:] if last else output, boundary.context["condition"])
        return logits


def first_state(stream: Stream, first: int, shape: tuple[int, ...], width: int) -> NDArray[np.float32]:
    """Standard normal (n, length, width) for examples from ``first`` on."""
    n, length = shape
    return normal(stream, first, n, length * width).reshape(n, length, width)
