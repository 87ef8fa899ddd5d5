"""Layers of Llama, Mistral, Qwen2 and Qwen3 against transformers' own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import BadInput, UsageError
from edgetrain.models.attention import KeyValue, attend
from edgetrain.models.llama import LlamaLayer, LlamaNorm, RMSNormFunction, SwiGLU
from edgetrain.models.rotary import rotate, tables
from edgetrain.spec import LanguageModelSpec
from tests.devices.subprocesses import run_python
from tests.models import bind, on_meta, parameters_below, random_layer, randomise, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = LanguageModelSpec(
    vocab_size=50, width=24, depth=3, heads=6, kv_heads=2, head_dim=8, mlp_width=40, max_length=128, norm_eps=1e-5
)
LLAMA3: dict[str, Any] = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 64}
MODELS = {
    "llama": TINY,
    "llama, untied, all biases, no groups": dataclasses.replace(
        TINY, tied=False, qkv_bias=True, out_bias=True, mlp_bias=True, kv_heads=6
    ),
    "llama3 rope": dataclasses.replace(TINY, **LLAMA3),
    "linear rope": dataclasses.replace(TINY, rope_scaling="linear", rope_factor=4.0, rope_theta=500.0),
    "mistral": dataclasses.replace(TINY, architecture="MistralForCausalLM", tied=False),
    "mistral, window": dataclasses.replace(TINY, architecture="MistralForCausalLM", sliding_window=4),
    "qwen2": dataclasses.replace(TINY, architecture="Qwen2ForCausalLM", qkv_bias=True, kv_heads=1),
    "qwen2, window": dataclasses.replace(TINY, architecture="Qwen2ForCausalLM", qkv_bias=True, sliding_window=5),
    "qwen3": dataclasses.replace(TINY, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=10, norm_eps=1e-6),
}
SMOL = LanguageModelSpec(width=576, depth=1, heads=9, kv_heads=3, head_dim=64, mlp_width=1536, vocab_size=10)


def reference(model: LanguageModelSpec) -> Any:
    """transformers' model of that spec, with random parameters and plain attention."""
    transformers = pytest.importorskip("transformers")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling != "none":
        rope |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_length,
        }
    kind = model.architecture.removesuffix("ForCausalLM")
    own: dict[str, Any] = {
        "Llama": {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias},
        "Mistral": {"sliding_window": model.sliding_window or None},
        "Qwen2": {"use_sliding_window": model.sliding_window > 0, "max_window_layers": 0},
        "Qwen3": {"attention_bias": model.qkv_bias},
    }[kind]
    if kind == "Qwen2":
        own["sliding_window"] = model.sliding_window or None
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=model.vocab_size, hidden_size=model.width, num_hidden_layers=model.depth,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        intermediate_size=model.mlp_width, max_position_embeddings=model.max_length, rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied, rope_parameters=rope, attn_implementation="eager", **own,
    )  # fmt: skip
    built = getattr(transformers, model.architecture)(config)
    randomise(built)
    built.tie_weights()
    return built.eval()


class Ours:
    """The same model of our layers: one skeleton on meta, bound to layer after layer."""

    def __init__(self, model: LanguageModelSpec, theirs: Any) -> None:
        self.model = model
        self.skeleton = on_meta(lambda: LlamaLayer(model))
        self.norm = on_meta(lambda: LlamaNorm(model))
        self.layers = [parameters_below(theirs, f"model.layers.{i}.") for i in range(model.depth)]
        self.last = parameters_below(theirs, "model.norm.")
        bind(self.norm, {f"norm.{name}": value for name, value in self.last.items()})
        self.embedding = nn.Parameter(theirs.model.embed_tokens.weight.detach().clone())
        self.output = self.embedding if model.tied else nn.Parameter(theirs.lm_head.weight.detach().clone())

    def logits(self, tokens: Tensor, past: list[KeyValue] | None = None) -> Tensor:
        hidden = F.embedding(tokens, self.embedding)
        for i, parameters in enumerate(self.layers):
            bind(self.skeleton, parameters)
            hidden = self.skeleton(hidden, past[i] if past else None)
        logits: Tensor = F.linear(self.norm(hidden), self.output)
        return logits

    def named(self) -> dict[str, nn.Parameter]:
        """By Hugging Face's names."""
        named = {f"model.layers.{i}.{name}": p for i, layer in enumerate(self.layers) for name, p in layer.items()}
        named |= {"model.norm.weight": self.last["weight"], "model.embed_tokens.weight": self.embedding}
        return named if self.model.tied else named | {"lm_head.weight": self.output}


def some_tokens(count: int = 13, n: int = 2) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (n, count), generator=torch.Generator().manual_seed(1))


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
        assert named[key].grad.abs().max() > 1e-5 or key.endswith("k_proj.bias"), f"{key}: nothing to compare"
        torch.testing.assert_close(parameter.grad, named[key].grad, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generation_with_a_cache_is_the_full_forward(name):
    model = MODELS[name]
    ours = Ours(model, reference(model))
    tokens = some_tokens(14)
    full = ours.logits(tokens)
    past = [KeyValue(2, model.kv_heads, 14, model.head_dim) for _ in range(model.depth)]
    # A prefill shorter than the windows, single tokens across their ends, prefills of three, single tokens again.
    cuts = [0, 3, 4, 5, 6, 9, 12, 13, 14]
    parts = [ours.logits(tokens[:, a:b], past) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)
    assert [cache.length for cache in past] == [14] * model.depth
    with pytest.raises(UsageError, match="15 tokens do not fit a cache of keys and values for 14"):
        ours.logits(tokens[:, :1], past)


@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
def test_the_window_in_plain_pytorch(tokens):
    q, k, v = torch.randn(3, 2, 2, tokens, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed = attend(q, k, v, window=4).unflatten(-1, (2, 4))
    for i in range(tokens):
        seen = slice(max(0, i - 3), i + 1)
        weight = (torch.einsum("nhd,nhjd->nhj", q[:, :, i], k[:, :, seen]) / 2).softmax(-1)
        torch.testing.assert_close(mixed[:, i], torch.einsum("nhj,nhjd->nhd", weight, v[:, :, seen]))


def test_rotation_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(3))

    def score(query_at: int, key_at: int) -> float:
        return (rotate(q, TINY, query_at) * rotate(k, TINY, key_at)).sum().item()

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_tables_made_in_inference_mode_serve_training():
    tables.cache_clear()
    x = torch.randn(1, 5, 2, 8)
    with torch.inference_mode():
        rotate(x, TINY, 0)
        attend(*torch.randn(3, 1, 2, 7, 8), window=3)
    q, k, v = (torch.randn(1, 2, 7, 8, requires_grad=True) for _ in range(3))
    attend(rotate(q, TINY, 0), k, v, window=3).sum().backward()
    assert v.grad is not None


def double(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


def test_the_functions_pass_gradcheck():
    x, weight = double(2, 3, 6), double(6, seed=1)
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-5)[0], (x, weight))
    assert torch.autograd.gradcheck(SwiGLU.apply, (double(2, 3, 5), double(2, 3, 5, seed=1)))
    assert torch.autograd.gradcheck(lambda x: rotate(x, TINY, 3), (double(2, 3, 2, 8),))
    rms = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5)[0], x / rms * weight)


def test_half_precision_norms_are_computed_in_float32():
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 300).to(torch.bfloat16).requires_grad_()
    weight = torch.linspace(0.5, 2, 64).to(torch.bfloat16).requires_grad_()
    y, _ = RMSNormFunction.apply(x, weight, 1e-5)
    expected = weight * F.rms_norm(x.float(), (64,), eps=1e-5).to(torch.bfloat16)
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("model", [SMOL, dataclasses.replace(SMOL, sliding_window=64)])
def test_what_a_layer_saves_for_backward(model):
    """Of d = 576, 3 of 9 heads of keys and 1536 in the gated layer: x, q, attention and stream 4 d, k and v 2 d / 3,
    gate and up 2 * 1536, one number a head and a norm. A mask of the window is shared by all layers."""
    layer = random_layer(lambda: LlamaLayer(model))
    tokens = 256
    hidden = torch.randn(1, tokens, 576, requires_grad=True)
    mask_bytes = tokens * tokens * 4 if model.sliding_window else 0
    per_token = (saved_bytes(lambda: layer(hidden), layer) - mask_bytes) / tokens
    print(f"saved for backward: {per_token / 1024:.2f} KiB a token")
    assert per_token <= 4 * (4 * 576 + 2 * 192 + 2 * 1536 + 9 + 2)


def test_modules_hold_nothing_but_parameters():
    for model in MODELS.values():
        for module in (on_meta(lambda m=model: LlamaLayer(m)), on_meta(lambda m=model: LlamaNorm(m))):
            assert not list(module.buffers())
            for part in module.modules():
                assert not any(isinstance(value, Tensor) for value in vars(part).values())


def test_other_activations_are_refused():
    with pytest.raises(BadInput, match="the activation gelu"):
        LlamaLayer(dataclasses.replace(TINY, activation="gelu"))


def test_neither_sympy_nor_dynamo_is_imported():
    code = """
import sys, torch
from edgetrain.models.gpt2 import GPT2Layer
from edgetrain.models.llama import LlamaLayer
from edgetrain.models.lora import DropoutMasks, set_masks, wrap
from edgetrain.spec import LanguageModelSpec
for layer in (LlamaLayer(LanguageModelSpec(vocab_size=1)), GPT2Layer(LanguageModelSpec("gpt2", vocab_size=1))):
    wrap(layer, ["q_proj", "down_proj"] if isinstance(layer, LlamaLayer) else ["c_proj"], 2, 4.0, 0.5)
    set_masks(layer, DropoutMasks(0, 0, 0, 0, 0.5))
    for p in layer.parameters():
        p.data.normal_()
    layer(torch.randn(1, 5, 64, requires_grad=True)).sum().backward()
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"
