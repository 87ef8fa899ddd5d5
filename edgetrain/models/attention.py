"""Causal attention with grouped queries, a sliding window, and a cache of keys and values for generation."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetrain.errors import UsageError


class KeyValue:
    """What one layer has seen while generating: keys and values of ``length`` tokens, in memory taken once."""

    def __init__(
        self,
        n: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.keys = torch.empty(n, kv_heads, max_tokens, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values (n, kv_heads, tokens, head_dim) -> views of all so far (n, kv_heads, length, head_dim)."""
        end, room = self.length + keys.shape[2], self.keys.shape[2]
        if end > room:
            raise UsageError(
                f"{end} tokens do not fit a cache of keys and values for {room}", "Generate fewer tokens at a time."
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@functools.lru_cache(maxsize=2)
def _mask(tokens: int, total: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores, (tokens, total): 0 where query i, the last ``tokens`` of ``total``, sees key j.

    In the dtype of the queries, since attention would turn a boolean mask into such a one for every layer and keep it.
    """
    with torch.inference_mode(False):
        first = total - tokens
        seen = torch.ones(tokens, total, dtype=torch.bool, device=device).tril_(first)
        if window:
            seen.triu_(first - window + 1)
        return torch.zeros(tokens, total, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def attend(queries: Tensor, keys: Tensor, values: Tensor, window: int = 0, past: KeyValue | None = None) -> Tensor:
    """Causal attention.

    Args:
        queries: (n, heads, tokens, head_dim).
        keys, values: (n, kv_heads, tokens, head_dim); heads is a multiple of kv_heads.
        window: how many tokens one sees, itself included; 0: all before it.
        past: seen before these; they are appended to it.

    Returns:
        (n, tokens, heads * head_dim).
    """
    tokens = queries.shape[2]
    if past is not None:
        keys, values = past.append(keys, values)
    if window and keys.shape[2] > tokens + window - 1:
        keys, values = (x[:, :, 1 - tokens - window :] for x in (keys, values))
    total = keys.shape[2]
    # On a CPU the flash kernel takes all these cases, grouped queries too, and saves q, k, v, the result and one
    # number for each row: no scores, and no copies of k and v for the heads that share them.
    mask = None
    if tokens > 1 and (total > tokens or 0 < window < total):
        mask = _mask(tokens, total, window, queries.dtype, queries.device)
    mixed = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return mixed.transpose(1, 2).flatten(2)
