"""Layers of Llama, Mistral, Qwen2 and Qwen3, with Hugging Face's parameter names.

For backward a layer saves its input, q, k, v, what attention made of them, the stream between its halves, and gate and
up: 22.5 KiB a token at width 576 with 3 of 9 heads of keys. Norms and the gated product are made again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgetrain.errors import BadInput
from edgetrain.models.attention import KeyValue, attend
from edgetrain.models.lora import Derived, Linear
from edgetrain.models.rotary import rotate
from edgetrain.spec import LanguageModelSpec


def _wide(x: Tensor) -> torch.dtype:
    """Norms are computed in at least float32, as transformers does."""
    return torch.promote_types(x.dtype, torch.float32)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., width) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))  # no squares in memory
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normalised(x: Tensor, inverse_rms: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse_rms).to(x.dtype).mul_(weight)


class RMSNormFunction(torch.autograd.Function):
    """y = w x / rms(x), rms(x) = sqrt(mean(x^2) + eps) (arXiv 1910.07467, equation 4), saving x alone.

    Beside y it returns 1 / rms(x), which has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse_rms = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return _normalised(x, inverse_rms, weight), inverse_rms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        """With x^ = x / rms(x): dw = sum dy x^ and dx = (w dy - x^ mean(w dy x^)) / rms(x)."""
        x, weight, inverse_rms = ctx.saved_tensors
        width = x.shape[-1]
        unit = x * inverse_rms
        product = gradient * unit
        dw = product.reshape(-1, width).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        mean = (product @ weight.to(product.dtype)).div_(-width).unsqueeze(-1)
        dx = torch.mul(gradient, weight, out=product).addcmul_(unit, mean).mul_(inverse_rms)
        return dx.to(x.dtype), dw, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202, equation 6), saving gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g): one exponential, and no memory but for the two gradients.

        This is where a layer's backward needs most.
        """
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        d_gate = torch.rsub(sigmoid, 1).mul_(gate).add_(1).mul_(sigmoid).mul_(gradient).mul_(up)
        d_up = sigmoid.mul_(gate).mul_(gradient)
        return d_gate, d_up


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def derived(self, x: Tensor) -> Derived:
        """The same for the linear maps that follow."""
        value, inverse_rms = RMSNormFunction.apply(x, self.weight, self.eps)
        return Derived(value, _normalised, (x, inverse_rms, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.derived(x).value


class Attention(nn.Module):
    """Grouped queries (arXiv 2305.13245) with rotary positions; Qwen3 normalises queries and keys of each head."""

    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.model = model
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.q_proj = Linear(model.width, queries, model.qkv_bias)
        self.k_proj = Linear(model.width, keys, model.qkv_bias)
        self.v_proj = Linear(model.width, keys, model.qkv_bias)
        self.o_proj = Linear(queries, model.width, model.out_bias)
        self.q_norm = RMSNorm(model.head_dim, model.norm_eps) if model.qk_norm else None
        self.k_norm = RMSNorm(model.head_dim, model.norm_eps) if model.qk_norm else None

    def forward(self, normed: Derived, past: KeyValue | None) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        offset = 0 if past is None else past.length
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.model.head_dim))  # (n, tokens, heads, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, self.model, offset), rotate(k, self.model, offset)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed: Tensor = self.o_proj(attend(q, k, v, self.model.sliding_window, past))
        return mixed


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, equation 6)."""

    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        if model.activation != "silu":
            raise BadInput(f"a {model.architecture} with the activation {model.activation}: only silu is known")
        self.gate_proj = Linear(model.width, model.mlp_width, model.mlp_bias)
        self.up_proj = Linear(model.width, model.mlp_width, model.mlp_bias)
        self.down_proj = Linear(model.mlp_width, model.width, model.mlp_bias)

    def forward(self, normed: Derived) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        gate, up = self.gate_proj(normed), self.up_proj(normed)
        down: Tensor = self.down_proj(Derived(SwiGLU.apply(gate, up), gated, (gate, up)))
        return down


class LlamaLayer(nn.Module):
    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.self_attn = Attention(model)
        self.mlp = GatedMLP(model)
        self.input_layernorm = RMSNorm(model.width, model.norm_eps)
        self.post_attention_layernorm = RMSNorm(model.width, model.norm_eps)

    def forward(self, hidden: Tensor, past: KeyValue | None = None) -> Tensor:
        """hidden (n, tokens, width) -> the same; positions start at ``past.length``, and ``past`` grows."""
        hidden = hidden + self.self_attn(self.input_layernorm.derived(hidden), past)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm.derived(hidden))
        return out


class LlamaNorm(nn.Module):
    """The norm before the output matrix."""

    def __init__(self, model: LanguageModelSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(model.width, model.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        normed: Tensor = self.norm(hidden)
        return normed
