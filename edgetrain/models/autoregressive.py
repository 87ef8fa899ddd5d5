"""A language model that predicts the next token, by DiffusionBlocks (arXiv 2506.14202, section 4) or as a whole.

Input of a block: the clean tokens, and for each position i a noisy unit row z_i = y_i + sigma * eps of the codebook,
y_i being that of the token after token i. The clean tokens see those up to themselves, never a noisy one. Noisy token
i sees clean tokens 0 .. i, which come before its target, and itself; it stands at its target's position, i + 1.
With two streams the clean tokens have a learned constant as condition: their keys and values do not depend on sigma.
With one, clean and noisy tokens have the same condition, as in one sequence [clean; noisy] with a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.data.batches import TextBatches
from edgetrain.models.attention import KeyValue, attend
from edgetrain.models.base import Boundary, Family
from edgetrain.models.text import TextHead, TextNetwork, TextStem, TokenLayer, cross_entropy
from edgetrain.spec import Spec, TextModelSpec

Seen = tuple[Tensor, Tensor]
"""Keys and values of clean tokens, each (n, heads, tokens, head_dim)."""


@functools.lru_cache(maxsize=2)
def _mask(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of noisy tokens, (tokens, 2 tokens): 0 where noisy i sees clean j <= i or itself."""
    with torch.inference_mode(False):
        clean = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_()
        sees = torch.cat([clean, torch.eye(tokens, dtype=torch.bool, device=device)], 1)
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))


class Layer(TokenLayer):
    """The clean stream, and the noisy one beside it if there is one."""

    def clean(self, x: Tensor, condition: Tensor, past: KeyValue | None = None) -> tuple[Tensor, Seen]:
        """x (n, tokens, width) after what ``past`` holds -> the same, and what noisy tokens see of it and ``past``."""
        seen: list[Seen] = []

        def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed = attend(q, k, v, past=past)
            seen.append((k, v) if past is None else (past.keys[:, :, : past.length], past.values[:, :, : past.length]))
            return mixed

        return self.stream(x, condition, causal, 0 if past is None else past.length), seen[0]

    def noisy(self, x: Tensor, condition: Tensor, seen: Seen) -> Tensor:
        """x (n, tokens, width), a noisy token for each clean one seen, or one for the last of them alone."""
        tokens, total = x.shape[1], seen[0].shape[2]

        def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2)
            mask = _mask(tokens, q.dtype, q.device) if tokens > 1 else None
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)

        return self.stream(x, condition, beside, 1 + total - tokens)

    def forward(self, boundary: Boundary) -> Boundary:
        carried, context = boundary.carried, boundary.context
        constant = context["clean_condition"] if "clean_condition" in context else context["condition"]
        clean, seen = self.clean(carried["clean"], constant)
        if "noisy" not in carried:
            return boundary.advance({"clean": clean})
        return boundary.advance({"clean": clean, "noisy": self.noisy(carried["noisy"], context["condition"], seen)})


class Stem(TextStem):
    """``previous``: a noisy token is given the clean token beside it as well, the one before its target."""

    def __init__(self, model: TextModelSpec, streams: int) -> None:
        super().__init__(model, num_tokens=model.vocab_size, is_timed=True, has_constant=streams == 2)
        self.previous = model.previous
        self.noisy = nn.Linear(model.width, model.width)

    def clean(self, tokens: Tensor) -> Boundary:
        """What depends on the tokens (n, tokens) alone."""
        context = {"clean_condition": self.constant} if hasattr(self, "clean_condition") else {}
        return Boundary({"clean": self.embedded(tokens)}, context)

    def noised(self, tokens: Tensor, scaled_z: Tensor, c_noise: Tensor) -> Boundary:
        """What is given of z (n, tokens, width) beside the tokens (n, tokens), c_noise (n,)."""
        noisy = self.noisy(scaled_z)
        if self.previous:
            noisy = noisy + self.embedded(tokens)
        return Boundary({"noisy": noisy}, {"condition": self.condition(c_noise)})

    def forward(self, tokens: Tensor, scaled_z: Tensor, c_noise: Tensor) -> Boundary:
        clean, noised = self.clean(tokens), self.noised(tokens, scaled_z, c_noise)
        return Boundary({**clean.carried, **noised.carried}, {**clean.context, **noised.context})


class Head(TextHead):
    """Reads the noisy tokens; ``joined``, each added to the clean token beside it, which comes before its target: then
    at sigma_max a block is no less than a transformer of its layers. ``auxiliary`` logits come from the clean ones."""

    def __init__(self, model: TextModelSpec, auxiliary: bool, joined: bool) -> None:
        super().__init__(model)
        self.joined = joined
        if auxiliary:
            self.auxiliary = nn.Linear(model.width, model.vocab_size)

    def network_output(self, boundary: Boundary) -> Tensor:
        """F, (n, tokens, width)."""
        carried = boundary.carried
        return carried["noisy"] + carried["clean"] if self.joined else carried["noisy"]

    def auxiliary_loss(self, boundary: Boundary, draw: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the targets by what the clean tokens say of them."""
        clean = boundary.carried["clean"]
        logits = self.auxiliary(F.rms_norm(clean, clean.shape[-1:]))
        return cross_entropy(logits, draw["targets"], draw["weights"])


class Autoregressive(Family):
    """Stages of a block."""

    def build(self, kind: str) -> nn.Module:
        model, method = self.spec.text_model, self.spec.diffusion_blocks
        if kind == "stem":
            return Stem(model, method.streams)
        return Head(model, method.auxiliary > 0, method.joined) if kind == "head" else Layer(model)


class CleanStem(TextStem):
    """Tokens alone."""

    def __init__(self, model: TextModelSpec) -> None:
        super().__init__(model, num_tokens=model.vocab_size, is_timed=False, has_constant=True)

    def forward(self, tokens: Tensor) -> Boundary:
        """(n, tokens)."""
        return Boundary({"clean": self.embedded(tokens)}, {"clean_condition": self.constant})


class AutoregressiveNetwork(TextNetwork):
    """The same transformer trained as a whole: the clean stream alone, from whose tokens the next ones are read."""

    def __init__(self, spec: Spec, batches: TextBatches | None) -> None:
        super().__init__(spec, Autoregressive(spec), batches)

    def build(self, kind: str) -> nn.Module:
        if kind == "stem":
            return CleanStem(self.model)
        return TextHead(self.model) if kind == "head" else Layer(self.model)

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        boundary: Boundary = stem(batch["tokens"])
        return boundary

    def logits(self, head: nn.Module, boundary: Boundary, last: bool = False) -> Tensor:
        clean = boundary.carried["clean"]
        logits: Tensor = head(clean[:, -1:] if last else clean, boundary.context["clean_condition"])
        return logits
