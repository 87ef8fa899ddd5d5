"""A language model that unmasks tokens in any order: masked diffusion (MD4, arXiv 2406.04329), in blocks or as a whole.

A token of a text is masked with probability 1 - alpha(t) = t. The model sees the tokens that are left, on both sides,
and says what the masked ones were. A bound on the text's negative log-likelihood is the mean over t in (0, 1] of
1 / t times the summed cross-entropy of what is masked (its equation 4 for alpha(t) = 1 - t).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.data.batches import TextBatches
from edgetrain.models.base import Boundary, Family
from edgetrain.models.text import TextHead, TextNetwork, TextStem, TokenLayer, attend_to_all, cross_entropy
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.training_data import MaskedBatches

# The noise embedding tells numbers between -1.6 and 1.6 apart.
_TIME_SCALE = 1.5


class Layer(TokenLayer):
    """All tokens attend to all."""

    def forward(self, boundary: Boundary) -> Boundary:
        return boundary.advance(
            {"tokens": self.stream(boundary.carried["tokens"], boundary.context["condition"], attend_to_all)}
        )


class Stem(TextStem):
    """The last row of the embedding is that of a masked token. With ``neighbours`` a token is also given a linear map
    of the embeddings of so many tokens on each side of it, nothing beyond the ends: what pairs of tokens say needs no
    layer then."""

    def __init__(self, model: TextModelSpec) -> None:
        super().__init__(model, num_tokens=model.vocab_size + 1, is_timed=True, has_constant=False)
        self.neighbours = model.neighbours
        if model.neighbours:
            self.beside = nn.Linear(2 * model.neighbours * model.width, model.width, bias=False)

    def forward(self, tokens: Tensor, t: Tensor) -> Boundary:
        """tokens (n, length), some of them ``vocab_size``; t (n,)."""
        embedded = self.embedded(tokens)
        if self.neighbours:
            embedded = embedded + self.beside(self._around(embedded))
        c_noise = _TIME_SCALE * (2 * t - 1)
        return Boundary({"tokens": embedded}, {"condition": self.condition(c_noise)})

    def _around(self, embedded: Tensor) -> Tensor:
        """(n, length, width) -> (n, length, 2 neighbours width), 0 beyond the ends."""
        reach, length = self.neighbours, embedded.shape[1]
        padded = F.pad(embedded, (0, 0, reach, reach))
        return torch.cat([padded[:, i : i + length] for i in range(2 * reach + 1) if i != reach], -1)


class Masked(Family):
    """Stages of a block, and of the whole."""

    def build(self, kind: str) -> nn.Module:
        model = self.spec.text_model
        if kind == "stem":
            return Stem(model)
        return TextHead(model) if kind == "head" else Layer(model)


class MaskedNetwork(TextNetwork):
    """The same transformer trained as a whole, every layer at every t."""

    def __init__(self, spec: Spec, batches: TextBatches | None) -> None:
        super().__init__(spec, Masked(spec), batches)
        self._batches = None if batches is None else MaskedBatches(spec, batches, 1)

    def build(self, kind: str) -> nn.Module:
        return self.family.build(kind)

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        assert self._batches is not None
        return self._batches.draw(0, step, first, count)

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        boundary: Boundary = stem(batch["tokens"], batch["t"])
        return boundary

    def logits(self, head: nn.Module, boundary: Boundary, last: bool = False) -> Tensor:
        return masked_logits(head, boundary)


def masked_logits(head: nn.Module, boundary: Boundary) -> Tensor:
    """(n, tokens, vocab_size)."""
    logits: Tensor = head(boundary.carried["tokens"], boundary.context["condition"])
    return logits


def unmasking_loss(head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
    """The micro-batch's part of the batch's bound, a token."""
    return cross_entropy(masked_logits(head, boundary), batch["targets"], batch["weights"])
