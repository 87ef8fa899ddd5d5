"""Linear maps of pretrained models, and the low-rank adapters they may carry (LoRA, arXiv 2106.09685).

What is cheap to compute again from tensors that are saved anyway (a norm, an activation) comes to a linear map as
``Derived``: then the map saves no input of its own for the gradient of its weight.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgetrain.errors import UsageError
from edgetrain.models.matrices import Matrix, ResidentMatrix, product, product_backward
from edgetrain.randomness import Purpose, Stream, words

Masks = Callable[[str, tuple[int, ...]], Tensor]
"""(name of a linear map within its layer, shape of its input) -> 0 or 1 / (1 - p) for each element."""


class Derived(NamedTuple):
    """A tensor that backward makes again: ``value`` equals ``make(*sources)``, bit for bit."""

    value: Tensor
    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def _same(x: Tensor) -> Tensor:
    return x


class _Map(torch.autograd.Function):
    """x (..., in) -> x W^T + b (..., out).

    The gradient of W is added by the product itself where there is memory for it: that saves a tensor as large as W,
    and with it most of what a step asks of the allocator.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes all by position)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        matrix: Matrix | None,
        in_out: bool,
        make: Callable[..., Tensor],
        *sources: Tensor,
    ) -> Tensor:
        # A frozen weight wants no gradient, so its input isn't needed again.
        ctx.save_for_backward(*(sources if ctx.needs_input_grad[1] else ()))
        ctx.weight, ctx.matrix, ctx.in_out, ctx.make, ctx.num_sources = weight, matrix, in_out, make, len(sources)
        return product(x, matrix or ResidentMatrix(weight, None), bias, in_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        flat = gradient.reshape(-1, gradient.shape[-1])
        x = dw = db = None
        matrix = ctx.matrix
        if ctx.needs_input_grad[1]:
            x = ctx.make(*ctx.saved_tensors).to(flat.dtype)  # which autocast may have narrowed
            x = x.reshape(-1, x.shape[-1])
            if matrix is None and ctx.weight.grad is None:
                dw = torch.zeros_like(ctx.weight)
        if matrix is None:
            matrix = ResidentMatrix(ctx.weight, ctx.weight.grad if dw is None else dw)
        dx = product_backward(flat, matrix, x, ctx.in_out, ctx.needs_input_grad[0])
        if dx is not None:
            dx = dx.view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[2]:
            db = flat.sum(0)
        # The sources get their gradient through x: here they only stand in for its values.
        return dx, dw, db, None, None, None, *(None,) * ctx.num_sources


class _Masked(torch.autograd.Function):
    """x times a mask that is made again in backward instead of saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Callable[[], Tensor]) -> Tensor:
        ctx.mask = mask
        return x * mask().to(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.mask().to(gradient), None


class LinearMap(nn.Module):
    """A linear map of ``num_in`` to ``num_out`` elements. Its parameters hold no values until they are bound.

    ``lora_A`` and ``lora_B``, added by ``wrap``, make it y = base(x) + (alpha / rank) B(A(dropout(x)))
    (arXiv 2106.09685, equation 3). ``masks`` is set before each run; None: no dropout. ``matrix``: where the weight is,
    if not in memory as a whole; then the parameter ``weight`` is empty, and tells by its ``requires_grad`` what to do.
    """

    in_out = False  # whether the weight is stored (in, out)

    def __init__(self, num_in: int, num_out: int, bias: bool = False) -> None:
        super().__init__()
        self.num_in, self.num_out = num_in, num_out
        self.weight = nn.Parameter(torch.empty((num_in, num_out) if self.in_out else (num_out, num_in)))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_out)) if bias else None)
        self.lora_A: Linear | None = None
        self.lora_B: Linear | None = None
        self.name, self.scale, self.dropout = "", 1.0, 0.0
        self.masks: Masks | None = None
        self.matrix: Matrix | None = None

    def adapt(self, name: str, rank: int, alpha: float, dropout: float) -> None:
        self.name, self.scale, self.dropout = name, alpha / rank, dropout
        self.lora_A, self.lora_B = Linear(self.num_in, rank), Linear(rank, self.num_out)

    def forward(self, x: Tensor | Derived) -> Tensor:
        """x (..., in) -> (..., out)."""
        given = x if isinstance(x, Derived) else Derived(x, _same, (x,))
        y: Tensor = _Map.apply(
            given.value, self.weight, self.bias, self.matrix, self.in_out, given.make, *given.sources
        )
        if self.lora_A is None or self.lora_B is None:
            return y
        low = self.lora_A(self._dropped(given))
        # One product that adds to y, instead of B's output and its multiple.
        flat, rank = y.flatten(0, -2), low.shape[-1]
        return torch.addmm(flat, low.view(-1, rank), self.lora_B.weight.T, alpha=self.scale).view(y.shape)

    def _dropped(self, x: Derived) -> Derived:
        if self.masks is None or self.dropout == 0:
            return x
        mask = functools.partial(self.masks, self.name, tuple(x.value.shape))

        def make(*sources: Tensor) -> Tensor:
            made = x.make(*sources)
            return made * mask().to(made)

        return Derived(_Masked.apply(x.value, mask), make, x.sources)


class Linear(LinearMap):
    """Stored (out, in), as nn.Linear's."""


class Conv1D(LinearMap):
    """Stored (in, out), as GPT-2's."""

    in_out = True


def wrap(layer: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> list[str]:
    """Gives every linear map that ``targets`` names the parameters ``lora_A.weight`` (rank, in) and ``lora_B.weight``
    (out, rank). A target is a map's whole name or the end of it after a dot: "q_proj" is "self_attn.q_proj", and
    GPT-2's "c_proj" both of that name.

    Returns:
        The names of the maps wrapped, in the order of the layer.

    Raises:
        UsageError: no map has that name, or a number is out of range.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise UsageError(
            f"an adapter of rank {rank} with dropout {dropout}", "The rank is 1 or more, dropout in [0, 1)."
        )
    maps = {name: module for name, module in layer.named_modules() if isinstance(module, LinearMap)}
    for target in targets:
        if not any(_names(target, name) for name in maps):
            raise UsageError(f"no linear map of a layer is called {target!r}", f"There are: {', '.join(maps)}.")
    wrapped = [name for name in maps if any(_names(target, name) for target in targets)]
    for name in wrapped:
        maps[name].adapt(name, rank, alpha, dropout)
    return wrapped


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def set_masks(layer: nn.Module, masks: Masks | None) -> None:
    """The dropout of the next runs of ``layer``; None for evaluation."""
    for module in layer.modules():
        if isinstance(module, LinearMap):
            module.masks = masks


class DropoutMasks:
    """Masks that are a pure function of (seed, stage, step, sample) and the map's name: made again they are the same,
    and sample i of a step gets its mask in whatever micro-batch it is. ``first_sample`` is that of this micro-batch."""

    def __init__(self, seed: int, stage_index: int, step: int, first_sample: int, probability: float) -> None:
        self.seed, self.stage_index, self.step = seed, stage_index, step
        self.first_sample, self.probability = first_sample, probability

    def __call__(self, module_name: str, shape: tuple[int, ...]) -> Tensor:
        """shape (n, ...) -> float32 of that shape, 0 with ``probability``, else 1 / (1 - probability)."""
        # Maps of one stage are told apart by the upper half of the counter word that holds the stage.
        stage = self.stage_index | zlib.crc32(module_name.encode()) << 32
        stream = Stream(self.seed, Purpose.DROPOUT, stage, self.step)
        threshold = np.uint32(min(round(self.probability * 2**32), 2**32 - 1))
        mask = np.empty((shape[0], int(np.prod(shape[1:]))), np.float32)
        half = -(-mask.shape[1] // 2)
        for sample, row in enumerate(mask):  # one at a time: words take four times the bytes of what is kept
            drawn = words(stream, self.first_sample + sample, 1, half)[0]
            # 32 bits an element: the lower halves of the words first, then the upper ones.
            row[:half] = drawn.astype(np.uint32) >= threshold
            row[half:] = ((drawn >> np.uint64(32)).astype(np.uint32) >= threshold)[: row.size - half]
        mask *= np.float32(1 / (1 - self.probability))
        return torch.from_numpy(mask.reshape(shape))
