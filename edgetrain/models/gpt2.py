"""Layers of GPT-2, with Hugging Face's parameter names and its weights stored (in, out)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import BadInput
from edgetrain.models.attention import KeyValue, attend
from edgetrain.models.lora import Conv1D, Derived
from edgetrain.spec import LanguageModelSpec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def derived(self, x: Tensor) -> Derived:
        """The same for the linear map that follows."""
        return Derived(self(x), self._normalised, (x, self.weight, self.bias))

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self._normalised(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.heads = model.heads
        self.c_attn = Conv1D(model.width, 3 * model.width, bias=True)
        self.c_proj = Conv1D(model.width, model.width, bias=True)

    def forward(self, normed: Derived, past: KeyValue | None) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        qkv = self.c_attn(normed).unflatten(-1, (3, self.heads, -1))  # (n, tokens, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (n, heads, tokens, head_dim)
        mixed: Tensor = self.c_proj(attend(q, k, v, past=past))
        return mixed


class MLP(nn.Module):
    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[model.activation]
        self.c_fc = Conv1D(model.width, model.mlp_width, bias=True)
        self.c_proj = Conv1D(model.mlp_width, model.width, bias=True)

    def forward(self, normed: Derived) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        inner = self.c_fc(normed)
        out: Tensor = self.c_proj(Derived(self.activation(inner), self.activation, (inner,)))
        return out


class GPT2Layer(nn.Module):
    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(model.width, model.norm_eps)
        self.attn = Attention(model)
        self.ln_2 = LayerNorm(model.width, model.norm_eps)
        self.mlp = MLP(model)

    def forward(self, hidden: Tensor, past: KeyValue | None = None) -> Tensor:
        """hidden (n, tokens, width) -> the same; ``past`` grows."""
        hidden = hidden + self.attn(self.ln_1.derived(hidden), past)
        out: Tensor = hidden + self.mlp(self.ln_2.derived(hidden))
        return out


class _Rows(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class GPT2Positions(nn.Module):
    """Learned positions, added to the embedded tokens."""

    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.wpe = _Rows(model.max_length, model.width)

    def forward(self, embedded: Tensor, offset: int = 0) -> Tensor:
        """embedded (n, tokens, width), the first token at position ``offset`` -> the same with positions."""
        end, rows = offset + embedded.shape[1], self.wpe.weight.shape[0]
        if end > rows:
            raise BadInput(f"{end} tokens, but the model has positions for {rows}", "Use shorter examples.")
        return embedded + self.wpe.weight[offset:end]


class GPT2Norm(nn.Module):
    """The norm before the output matrix."""

    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.ln_f = LayerNorm(model.width, model.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        normed: Tensor = self.ln_f(hidden)
        return normed
