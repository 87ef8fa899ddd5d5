"""Rotary positions: pairs of a head's elements turned by an angle that grows with the position (arXiv 2104.09864).

The tables are no state of any module: layers are skeletons bound again and again, and all of a model share one table.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgetrain.architectures import Rotary, inverse_frequencies

Tables = tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=4)
def tables(model: Rotary, length: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """cos and sin of the angles at positions ``offset ... offset + length - 1``, each (length, 1, head_dim / 2).

    Angles are computed in float32 and rounded to ``dtype`` last, as transformers does.
    """
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        positions = torch.arange(offset, offset + length, dtype=torch.float32, device=device)
        frequencies = torch.from_numpy(inverse_frequencies(model)).to(device)
        angles = (positions[:, None] * frequencies)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Turns by ``sign`` times the angle. Element i is paired with i + head_dim / 2, as in Hugging Face weights."""
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


class _Rotate(torch.autograd.Function):
    """Linear and orthogonal: backward turns the other way, and needs nothing but the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = (cos, sin)  # shared constants: neither saved for each layer nor offloaded with what is saved
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.tables
        return _turn(gradient, cos, sin, -1), None, None


def rotate(x: Tensor, model: Rotary, offset: int) -> Tensor:
    """x (n, tokens, heads, head_dim), the first token at position ``offset`` -> the same, rotated."""
    turned: Tensor = _Rotate.apply(x, *tables(model, x.shape[1], offset, x.dtype, x.device))
    return turned
