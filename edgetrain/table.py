"""A token table in chunks of rows: looking rows up, and cross-entropy over the vocabulary without all logits at once.

The loss is taken in two passes over the chunks, the first for the sum of exponentials (online, in the manner of
Milakov & Gimelshein, arXiv 1805.02867, algorithm 3), the second for the gradient softmax - onehot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.boundaries import Boundaries
from edgetrain.moves import Move, widened
from edgetrain.store.layout import StageLayout


class Rows(nn.Module):
    """The rows of one chunk, (rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, device="meta"))


def gather(tokens: NDArray[np.int64], chunks: Sequence[tuple[str, StageLayout]], read: Move) -> Tensor:
    """The rows of ``tokens`` (n, length) -> (n, length, width) float32, each read once.

    Args:
        chunks: the stage and layout of each chunk; all but the last have the same number of rows.
    """
    distinct, where = np.unique(tokens, return_inverse=True)
    rows_of_chunk, width = chunks[0][1].tensors[0].shape
    found = np.empty((len(distinct), width), np.float32)
    for row, token in zip(found, distinct.tolist(), strict=True):
        chunk, number = divmod(token, rows_of_chunk)
        stage, layout = chunks[chunk]
        tensor, role = layout.tensors[0], "weight" if layout.trained else "frozen"
        stored = np.empty(tensor.nbytes // tensor.shape[0], np.uint8)
        read(stage, role, stored.data, number * len(stored))
        row[:] = widened(stored, tensor.dtype)
    return torch.from_numpy(found[where.reshape(tokens.shape)])


def add_rows(gradient: Tensor, first_token: int, tokens: Tensor, rows: Tensor) -> None:
    """Adds the gradients ``rows`` (n, width) of looked up ``tokens`` (n,) to a chunk's (rows, width), in order."""
    inside = (tokens >= first_token) & (tokens < first_token + len(gradient))
    gradient.index_add_(0, tokens[inside] - first_token, rows[inside])


class _Part:
    """A micro-batch: what counts of it, and the sums over the chunks so far."""

    def __init__(self, targets: Tensor, weights: Tensor, dtype: torch.dtype, selects: bool) -> None:
        self.counts = weights > 0 if selects else torch.ones_like(weights, dtype=torch.bool)
        self.targets, self.weights = targets[self.counts], weights[self.counts]  # (n,)
        n = len(self.targets)
        self.largest = weights.new_full((n,), -torch.inf, dtype=dtype)
        self.sum = weights.new_zeros(n, dtype=torch.float64)  # of exp(logit - largest)
        self.target_logit = weights.new_zeros(n, dtype=dtype)

    @property
    def log_sum(self) -> Tensor:
        return self.largest + self.sum.log().to(self.largest.dtype)

    def inside(self, first_token: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """(row of the micro-batch, column of the chunk) of the targets that the chunk has."""
        rows = ((self.targets >= first_token) & (self.targets < first_token + num_rows)).nonzero()[:, 0]
        return rows, self.targets[rows] - first_token


class ChunkedCrossEntropy:
    """The weighted sum of cross-entropies of all micro-batches.

    ``logits``: whether those of the first pass are kept for the second, moved out with the boundaries, or made again.
    ``bf16``: whether products are rounded to that, and what goes into them; sums of exponentials are not.
    Calls: ``add`` each micro-batch; ``forward`` each chunk; ``loss``; ``backward`` each chunk; ``gradient``.
    """

    def __init__(self, boundaries: Boundaries, logits: str, bf16: bool = False) -> None:
        self._boundaries, self._policy, self._bf16 = boundaries, logits, bf16
        self._parts: list[_Part] = []
        self._logits: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def add(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> None:
        """hidden (n, width), targets (n,), weights (n,)."""
        # In bf16 a library keeps code for each shape that it meets: what does not count goes along, with no weight.
        part = _Part(targets, weights, hidden.dtype, selects=not self._bf16)
        counted = hidden if bool(part.counts.all()) else hidden[part.counts]
        self._boundaries.put(("hidden", 0, len(self._parts)), {"hidden": counted})
        self._parts.append(part)

    def _hidden(self, number: int) -> Tensor:
        """What counts of a micro-batch, (n, width)."""
        return self._boundaries.get(("hidden", 0, number))["hidden"]

    @torch.no_grad()
    def forward(self, chunk: int, first_token: int, rows: Tensor, differentiates: bool) -> None:
        """Takes the logits of a chunk's ``rows`` (rows, width), of the tokens from ``first_token`` on."""
        for number, part in enumerate(self._parts):
            logits = self._product(self._hidden(number), rows.T)  # (n, rows)
            where, columns = part.inside(first_token, len(rows))
            part.target_logit[where] = logits[where, columns]
            largest = torch.maximum(part.largest, logits.amax(1))
            part.sum *= (part.largest - largest).exp().double()
            part.largest = largest
            policy = self._policy if differentiates else "recompute"
            if policy == "keep":
                self._logits[chunk, number] = logits
            elif policy == "offload":
                self._boundaries.put(("logits", chunk, number), {"logits": logits}, moves=True)
            shifted = logits - largest[:, None] if policy == "keep" else logits.sub_(largest[:, None])
            part.sum += shifted.exp_().sum(1)

    @torch.no_grad()
    def loss(self) -> float:
        """Not a number if nothing counts: no step is to be made then."""
        if not any(bool((part.weights > 0).any()) for part in self._parts):
            return math.nan
        return sum(((p.log_sum - p.target_logit).double() * p.weights).sum().item() for p in self._parts)

    @torch.no_grad()
    def backward(self, chunk: int, first_token: int, rows: Tensor, gradient: Tensor | None) -> None:
        """Adds to the gradient of the hidden states, and to ``gradient`` of the rows (rows, width) if there is one."""
        for number, part in enumerate(self._parts):
            hidden = self._hidden(number)
            p = self._logits_again(chunk, number, hidden, rows)
            where, columns = part.inside(first_token, len(rows))
            p.sub_(part.log_sum[:, None]).exp_()
            p[where, columns] -= 1
            p *= part.weights[:, None]  # dL / dlogits, (n, rows)
            key = ("d_hidden", 0, number)
            before = self._boundaries.get(key)["gradient"] if self._boundaries.has(key) else None
            self._boundaries.put(key, {"gradient": self._product(p, rows, before)})
            if gradient is not None:
                gradient.copy_(self._product(p.T, hidden, gradient)) if self._bf16 else gradient.addmm_(p.T, hidden)

    def _logits_again(self, chunk: int, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
        if (kept := self._logits.pop((chunk, number), None)) is not None:
            return kept
        if self._policy == "offload":
            key = ("logits", chunk, number)
            logits = self._boundaries.get(key)["logits"]
            self._boundaries.drop(key)
            return logits
        return self._product(hidden, rows.T)

    def _product(self, a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
        if self._bf16:
            product = (a.bfloat16() @ b.bfloat16()).float()
            return product if plus is None else product.add_(plus)
        return a @ b if plus is None else plus.addmm(a, b)

    def gradient(self, number: int) -> Tensor:
        """Of a micro-batch's hidden states as they were added, (n, width)."""
        counts = self._parts[number].counts
        found = self._boundaries.get(("d_hidden", 0, number))["gradient"]
        self._boundaries.drop(("d_hidden", 0, number))
        self._boundaries.drop(("hidden", 0, number))
        if len(found) == len(counts):
            return found
        whole = found.new_zeros(len(counts), found.shape[1])
        whole[counts] = found
        return whole
