"""Pretrained causal language models as exact training sees them: text, layers, and the loss of the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain.adapters import lora_targets
from edgetrain.data.batches import TextBatches
from edgetrain.data.text import TextDataset
from edgetrain.models import lora
from edgetrain.models.attention import KeyValue
from edgetrain.models.base import Boundary, Network
from edgetrain.models.gpt2 import GPT2Layer, GPT2Norm, GPT2Positions
from edgetrain.models.llama import LlamaLayer, LlamaNorm
from edgetrain.spec import Spec


class LanguageNetwork(Network):
    """Llama, Mistral, Qwen2, Qwen3 and GPT-2. ``dataset`` may be None where nothing is drawn."""

    def __init__(self, spec: Spec, dataset: TextDataset | None) -> None:
        self.spec, self.model = spec, spec.language
        self.guess = math.log(max(2, self.model.vocab_size))
        train = spec.train
        self._batches = None if dataset is None else TextBatches(dataset, train.seed, train.batch_size)

    @property
    def examples(self) -> str:
        return "sequences"

    def build(self, kind: str) -> nn.Module:
        gpt2 = self.model.family == "gpt2"
        if kind == "stem":
            return GPT2Positions(self.model) if gpt2 else nn.Module()
        if kind == "head":
            return GPT2Norm(self.model) if gpt2 else LlamaNorm(self.model)
        layer = GPT2Layer(self.model) if gpt2 else LlamaLayer(self.model)
        exact = self.spec.exact
        if exact.train == "lora":
            lora.wrap(layer, lora_targets(self.spec), exact.rank, exact.alpha, exact.dropout)
        return layer

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """tokens (n, length), and flat: targets (n * length,), weights (n * length,) that sum to 1 over the batch."""
        assert self._batches is not None
        tokens, targets, weights = self._batches(0, step, first, count)
        return {"tokens": tokens, "targets": targets.reshape(-1), "weights": weights.reshape(-1)}

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        embedded = batch["embedded"]
        hidden = stem(embedded) if self.model.family == "gpt2" else embedded
        return Boundary({"hidden": hidden}, {})

    def layer(self, layer: nn.Module, boundary: Boundary, past: KeyValue | None = None) -> Boundary:
        return boundary.advance({"hidden": layer(boundary.carried["hidden"], past)})

    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        hidden: Tensor = head(boundary.carried["hidden"])
        return hidden.flatten(0, 1)

    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1

    def prepare(self, module: nn.Module, stage_index: int, step: int, first: int) -> None:
        exact = self.spec.exact
        if exact.train == "lora" and exact.dropout:
            seed = self.spec.train.seed
            lora.set_masks(module, lora.DropoutMasks(seed, stage_index, step, first, exact.dropout))
