"""The matrices of linear maps, in tiles of whole rows: resident ones are cut in memory, others come one tile at a time.

Products go tile by tile wherever the matrix is, so that its place changes no bit; one below the size of a tile is one.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.pieces import rows_of_tile


class Matrix(abc.ABC):
    """A matrix of ``shape`` (rows, columns) as it is stored, and the gradient of it."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each tile."""
        rows, columns = self.shape
        step = rows_of_tile(columns)
        return ((first, min(step, rows - first)) for first in range(0, rows, step))

    @abc.abstractmethod
    def tile(self, first: int, count: int) -> Tensor:
        """Rows (count, columns), to be read until the next call."""

    @abc.abstractmethod
    def add(self, first: int, a: Tensor, b: Tensor) -> None:
        """Adds a b (count, columns) to the gradient of the rows from ``first`` on."""


class ResidentMatrix(Matrix):
    """``gradient``: where gradients are added; None if nothing trains."""

    def __init__(self, weight: Tensor, gradient: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self._weight, self._gradient = weight.detach(), gradient

    def tile(self, first: int, count: int) -> Tensor:
        return self._weight[first : first + count]

    def add(self, first: int, a: Tensor, b: Tensor) -> None:
        assert self._gradient is not None
        add_product(self._gradient[first : first + a.shape[0]], a, b)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a b; factors in another type than ``into`` are multiplied in theirs."""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into.add_(a @ b)


def product(x: Tensor, matrix: Matrix, bias: Tensor | None, in_out: bool) -> Tensor:
    """x (..., in) -> x W^T + b (..., out), in bf16 under autocast; with ``in_out`` W is stored (in, out)."""
    spans = list(matrix.spans())
    if len(spans) == 1:
        weight = matrix.tile(*spans[0])
        return F.linear(x, weight.T if in_out else weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = x.reshape(-1, x.shape[-1])
    if in_out:
        y = _summed(flat, matrix, spans)
    else:
        y = flat.new_empty(len(flat), matrix.shape[0])
        for first, count in spans:
            torch.mm(flat, matrix.tile(first, count).to(x.dtype).T, out=y[:, first : first + count])
    if bias is not None:
        y += bias.to(y.dtype)
    return y.unflatten(0, x.shape[:-1])


def product_backward(
    gradient: Tensor, matrix: Matrix, x: Tensor | None, in_out: bool, wants_input: bool
) -> Tensor | None:
    """From dL/dy (n, out): adds dL/dW, if x (n, in) is given, and returns dL/dx (n, in) if that is wanted."""
    spans = list(matrix.spans())
    for first, count in spans if x is not None else ():
        assert x is not None
        own: Any = slice(first, first + count)
        matrix.add(first, *((x[:, own].T, gradient) if in_out else (gradient[:, own].T, x)))
    if not wants_input:
        return None
    if len(spans) == 1:
        rows = matrix.tile(*spans[0]).to(gradient.dtype)
        return gradient @ (rows.T if in_out else rows)
    if not in_out:
        return _summed(gradient, matrix, spans)
    dx = gradient.new_empty(len(gradient), matrix.shape[0])
    for first, count in spans:
        rows = matrix.tile(first, count).to(gradient.dtype)
        torch.mm(gradient, rows.T, out=dx[:, first : first + count])
    return dx


def _summed(a: Tensor, matrix: Matrix, spans: Sequence[tuple[int, int]]) -> Tensor:
    """a (n, rows) times the matrix (n, columns); what tiles of a narrow type contribute is summed in float32."""
    total = a.new_zeros(len(a), matrix.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    for first, count in spans:
        add_product(total, a[:, first : first + count], matrix.tile(first, count).to(a.dtype))
    return total.to(a.dtype)
