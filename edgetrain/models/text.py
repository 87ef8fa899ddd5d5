"""What the language models that are trained from the beginning share.

A layer is one of Llama (norm by the root mean square, rotary positions, gated MLP, arXiv 2302.13971) whose norms adapt
to a condition as in DiT (arXiv 2212.09748): shift, scale and gate are linear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.data.batches import TextBatches
from edgetrain.models.base import Boundary, Family, Layer, Network
from edgetrain.models.llama import SwiGLU
from edgetrain.models.rotary import rotate
from edgetrain.models.vit import NUM_FREQUENCIES, embed_noise
from edgetrain.parameters import decays
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.training_data import guess

_EPS = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values, each (n, heads, tokens, head_dim) -> (n, tokens, width)."""


def adapted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x / rms(x), then the condition's shift and scale."""
    return F.rms_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


def attend_to_all(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Every token to every other one."""
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


class TokenLayer(Layer):
    """A layer; a family decides what its streams are and which tokens see which."""

    def __init__(self, model: TextModelSpec) -> None:
        super().__init__()
        width, hidden = model.width, model.mlp_ratio * model.width
        self.model = model
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def stream(self, x: Tensor, condition: Tensor, attend: Attend, offset: int = 0) -> Tensor:
        """One stream through the layer.

        Args:
            x: (n, tokens, width), the first token at position ``offset``.
            condition: SiLU of the condition, (n, 1, width) or (width,).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        qkv = self.qkv(adapted(x, shift1, scale1)).unflatten(-1, (3, self.model.heads, -1))
        q, k, v = qkv.unbind(2)  # each (n, tokens, heads, head_dim)
        q, k = rotate(q, self.model, offset), rotate(k, self.model, offset)
        x = x + gate1 * self.out(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        gate, up = self.gate_up(adapted(x, shift2, scale2)).chunk(2, -1)
        out: Tensor = x + gate2 * self.down(SwiGLU.apply(gate, up))
        return out


class TextStem(nn.Module):
    """The embedding of tokens, of a noise level unless ``is_timed`` is false, and a learned constant in its place for
    what is clean."""

    def __init__(self, model: TextModelSpec, *, num_tokens: int, is_timed: bool, has_constant: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, model.width))
        if is_timed:
            self.time_in = nn.Linear(2 * NUM_FREQUENCIES, model.width)
            self.time_out = nn.Linear(model.width, model.width)
        if has_constant:
            self.clean_condition = nn.Parameter(torch.empty(model.width))

    def embedded(self, tokens: Tensor) -> Tensor:
        """(n, tokens) -> (n, tokens, width)."""
        return F.embedding(tokens, self.tokens)

    def condition(self, c_noise: Tensor) -> Tensor:
        """c_noise (n,) -> SiLU of the condition, (n, 1, width)."""
        return F.silu(embed_noise(c_noise, self.time_in, self.time_out))[:, None]

    @property
    def constant(self) -> Tensor:
        """SiLU of the condition of what is clean, (width,)."""
        return F.silu(self.clean_condition)


class TextHead(nn.Module):
    """Logits by an untied linear map after a norm that adapts to the condition."""

    def __init__(self, model: TextModelSpec) -> None:
        super().__init__()
        self.modulation = nn.Linear(model.width, 2 * model.width)
        self.readout = nn.Linear(model.width, model.vocab_size)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """hidden (n, tokens, width), condition (n, 1, width) or (width,) -> (n, tokens, vocab_size)."""
        shift, scale = self.modulation(condition).chunk(2, -1)
        logits: Tensor = self.readout(adapted(hidden, shift, scale))
        return logits


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum: logits (n, tokens, vocab_size), targets and weights (n, tokens)."""
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum()


class TextNetwork(Network):
    """A language model trained as a whole. ``batches`` is None where nothing is drawn."""

    def __init__(self, spec: Spec, family: Family, batches: TextBatches | None) -> None:
        self.spec, self.model, self.family, self.batches = spec, spec.text_model, family, batches
        self.guess = guess(spec)

    @property
    def examples(self) -> str:
        return "sequences"

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """tokens, targets and weights, each (n, length); the weights sum to 1 over the batch."""
        assert self.batches is not None
        return dict(zip(("tokens", "targets", "weights"), self.batches(0, step, first, count), strict=True))

    def layer(self, layer: nn.Module, boundary: Boundary) -> Boundary:
        advanced: Boundary = layer(boundary)
        return advanced

    def logits(self, head: nn.Module, boundary: Boundary, last: bool = False) -> Tensor:
        """(n, tokens, vocab_size); with ``last`` of the last token alone."""
        raise NotImplementedError

    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(self.logits(head, boundary), batch["targets"], batch["weights"])

    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        return decays(name)
