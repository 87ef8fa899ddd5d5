"""Layers of GPT-2 against transformers' own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import BadInput
from edgetrain.models.attention import KeyValue
from edgetrain.models.gpt2 import GPT2Layer, GPT2Norm, GPT2Positions
from edgetrain.spec import LanguageModelSpec
from tests.models import bind, on_meta, parameters_below, random_layer, randomise, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = LanguageModelSpec(
    family="gpt2", architecture="GPT2LMHeadModel", vocab_size=50, width=24, depth=3, heads=3, kv_heads=3, head_dim=8,
    mlp_width=96, max_length=16, activation="gelu_new",
)  # fmt: skip
MODELS = {
    "gpt2": TINY,
    "exact gelu, untied": dataclasses.replace(TINY, activation="gelu", tied=False, mlp_width=40),
}


def reference(model: LanguageModelSpec) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size, n_positions=model.max_length, n_embd=model.width, n_layer=model.depth,
        n_head=model.heads, n_inner=model.mlp_width, activation_function=model.activation, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=model.norm_eps, tie_word_embeddings=model.tied,
        attn_implementation="eager",
    )  # fmt: skip
    built = transformers.GPT2LMHeadModel(config)
    randomise(built)
    built.tie_weights()
    return built.eval()


class Ours:
    """The same model of our layers: one skeleton on meta, bound to layer after layer."""

    def __init__(self, model: LanguageModelSpec, theirs: Any) -> None:
        self.model = model
        self.skeleton = on_meta(lambda: GPT2Layer(model))
        self.positions, self.norm = on_meta(lambda: GPT2Positions(model)), on_meta(lambda: GPT2Norm(model))
        self.layers = [parameters_below(theirs, f"transformer.h.{i}.") for i in range(model.depth)]
        self.first, self.last = (
            parameters_below(theirs, "transformer.wpe."),
            parameters_below(theirs, "transformer.ln_f."),
        )
        bind(self.positions, {f"wpe.{name}": value for name, value in self.first.items()})
        bind(self.norm, {f"ln_f.{name}": value for name, value in self.last.items()})
        self.embedding = nn.Parameter(theirs.transformer.wte.weight.detach().clone())
        self.output = self.embedding if model.tied else nn.Parameter(theirs.lm_head.weight.detach().clone())

    def logits(self, tokens: Tensor, past: list[KeyValue] | None = None) -> Tensor:
        hidden = self.positions(F.embedding(tokens, self.embedding), past[0].length if past else 0)
        for i, parameters in enumerate(self.layers):
            bind(self.skeleton, parameters)
            hidden = self.skeleton(hidden, past[i] if past else None)
        logits: Tensor = F.linear(self.norm(hidden), self.output)
        return logits

    def named(self) -> dict[str, nn.Parameter]:
        """By Hugging Face's names."""
        named = {f"transformer.h.{i}.{name}": p for i, layer in enumerate(self.layers) for name, p in layer.items()}
        named |= {f"transformer.ln_f.{name}": p for name, p in self.last.items()}
        named |= {"transformer.wpe.weight": self.first["weight"], "transformer.wte.weight": self.embedding}
        return named if self.model.tied else named | {"lm_head.weight": self.output}


def some_tokens(count: int = 13) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (2, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_all_gradients_are_those_of_transformers(name):
    theirs = reference(MODELS[name])
    ours = Ours(MODELS[name], theirs)
    tokens = some_tokens()
    expected, logits = theirs(tokens).logits, ours.logits(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for values in (expected, logits):
        F.cross_entropy(values[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    named = dict(theirs.named_parameters())
    assert set(named) == set(ours.named())
    for key, parameter in ours.named().items():
        assert named[key].grad.abs().max() > 1e-4, f"{key}: nothing to compare"
        torch.testing.assert_close(parameter.grad, named[key].grad, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: k + m)


@torch.no_grad()
def test_generation_with_a_cache_is_the_full_forward():
    ours = Ours(TINY, reference(TINY))
    tokens = some_tokens(14)
    full = ours.logits(tokens)
    past = [KeyValue(2, 3, 14, 8) for _ in range(TINY.depth)]
    cuts = [0, 6, 7, 8, 11, 12, 13, 14]
    parts = [ours.logits(tokens[:, a:b], past) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_positions_are_refused():
    positions = random_layer(lambda: GPT2Positions(TINY))
    assert positions(torch.zeros(1, 4, 24), 12).shape == (1, 4, 24)
    with pytest.raises(BadInput, match="17 tokens, but the model has positions for 16"):
        positions(torch.zeros(1, 5, 24), 12)


def test_what_a_layer_saves_for_backward():
    """Of width d: x, qkv, attention, stream and the 4 d before the activation; a number a head, two for each norm."""
    model = dataclasses.replace(TINY, width=768, heads=12, kv_heads=12, head_dim=64, mlp_width=3072)
    layer = random_layer(lambda: GPT2Layer(model))
    hidden = torch.randn(1, 64, 768, requires_grad=True)
    per_token = saved_bytes(lambda: layer(hidden), layer) / 64
    print(f"saved for backward: {per_token / 1024:.2f} KiB a token")
    assert per_token <= 4 * (10 * 768 + 12 + 4)


def test_modules_hold_nothing_but_parameters():
    for make in (GPT2Layer, GPT2Norm, GPT2Positions):
        module = on_meta(lambda make=make: make(TINY))
        assert not list(module.buffers())
        for part in module.modules():
            assert not any(isinstance(value, Tensor) for value in vars(part).values())
