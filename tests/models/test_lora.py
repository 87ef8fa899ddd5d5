"""Low-rank adapters: against merged weights, against peft, and their dropout."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgetrain.adapters import initial_adapter
from edgetrain.errors import UsageError
from edgetrain.models.gpt2 import GPT2Layer
from edgetrain.models.llama import LlamaLayer
from edgetrain.models.lora import Conv1D, Derived, DropoutMasks, Linear, LinearMap, set_masks, wrap
from edgetrain.randomness import Purpose, Stream, uniform
from edgetrain.spec import LanguageModelSpec
from tests.models import on_meta, random_layer, randomise, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = LanguageModelSpec(vocab_size=50, width=24, heads=6, kv_heads=2, head_dim=4, mlp_width=40, qkv_bias=True)
GPT2 = dataclasses.replace(LLAMA, family="gpt2", kv_heads=6, activation="gelu_new")
LAYERS: dict[str, Any] = {
    "llama": (lambda: LlamaLayer(LLAMA), ["q_proj", "v_proj", "mlp.down_proj", "gate_proj"]),
    "gpt2": (lambda: GPT2Layer(GPT2), ["c_attn", "c_proj"]),
}


def hidden_states(n: int = 4, requires_grad: bool = True) -> Tensor:
    return torch.randn(n, 7, 24, generator=torch.Generator().manual_seed(4)).requires_grad_(requires_grad)


def adapted(name: str, dropout: float = 0.0) -> Any:
    """A layer whose base is frozen, with adapters that are not zero."""
    make, targets = LAYERS[name]
    layer = random_layer(make, 0.3)
    wrap(layer, targets, rank=3, alpha=6.0, dropout=dropout)
    randomise(layer, 0.3)
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return layer


def maps_with_adapters(layer: nn.Module) -> dict[str, Any]:
    return {
        name: m
        for name, m in layer.named_modules()
        if isinstance(m, LinearMap) and getattr(m, "lora_A", None) is not None
    }


def test_names_and_shapes():
    layer = on_meta(lambda: LlamaLayer(LLAMA))
    assert wrap(layer, ["q_proj", "mlp.down_proj"], 3, 6.0) == ["self_attn.q_proj", "mlp.down_proj"]
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if "q_proj" in name or "lora" in name}
    assert shapes == {
        "self_attn.q_proj.weight": (24, 24), "self_attn.q_proj.bias": (24,),
        "self_attn.q_proj.lora_A.weight": (3, 24), "self_attn.q_proj.lora_B.weight": (24, 3),
        "mlp.down_proj.lora_A.weight": (3, 40), "mlp.down_proj.lora_B.weight": (24, 3),
    }  # fmt: skip
    gpt2: Any = GPT2Layer(GPT2)
    assert wrap(gpt2, ["c_proj"], 3, 6.0) == ["attn.c_proj", "mlp.c_proj"]
    assert gpt2.mlp.c_proj.lora_A.weight.shape == (3, 40)
    assert gpt2.mlp.c_proj.lora_B.weight.shape == (24, 3)


def test_an_unknown_target_names_those_that_exist():
    layer = LlamaLayer(LLAMA)
    with pytest.raises(UsageError, match="'proj'") as caught:
        wrap(layer, ["q_proj", "proj"], 3, 6.0)
    assert "self_attn.q_proj, self_attn.k_proj" in str(caught.value)
    assert not maps_with_adapters(layer)
    for rank, dropout in ((0, 0.0), (1, 1.0), (1, -0.1)):
        with pytest.raises(UsageError, match=f"rank {rank}"):
            wrap(layer, ["q_proj"], rank, 6.0, dropout)


@pytest.mark.parametrize("name", LAYERS)
def test_with_b_zero_the_output_is_that_of_the_base(name):
    layer = adapted(name)
    base = LAYERS[name][0]()
    base.load_state_dict({key: value for key, value in layer.state_dict().items() if "lora_" not in key})
    hidden = hidden_states()
    assert not torch.equal(layer(hidden), base(hidden))
    for module in maps_with_adapters(layer).values():
        module.lora_B.weight.data.zero_()
    assert torch.equal(layer(hidden), base(hidden))


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_equal_merged_weights(name):
    layer = adapted(name).double()
    merged = LAYERS[name][0]().double()
    state = layer.state_dict()
    for key in maps_with_adapters(layer):
        update = 2.0 * state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
        state[f"{key}.weight"] = state[f"{key}.weight"] + (update.T if name == "gpt2" else update)
    merged.load_state_dict({key: value for key, value in state.items() if "lora_" not in key})
    hidden, other = (hidden_states().detach().double().requires_grad_() for _ in range(2))
    y, expected = layer(hidden), merged(other)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    (y * y).sum().backward()
    (expected * expected).sum().backward()
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-6, atol=1e-6)
    # W' = W + s B A: dB = s dW A^T, dA = s B^T dW.
    gradients = {key: p.grad for key, p in merged.named_parameters()}
    for key, module in maps_with_adapters(layer).items():
        dw = gradients[f"{key}.weight"].T if name == "gpt2" else gradients[f"{key}.weight"]
        torch.testing.assert_close(module.lora_B.weight.grad, 2.0 * dw @ module.lora_A.weight.T, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(module.lora_A.weight.grad, 2.0 * module.lora_B.weight.T @ dw, rtol=1e-6, atol=1e-6)
        assert module.weight.grad is None


def test_outputs_and_gradients_are_those_of_peft():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
        intermediate_size=40, attention_bias=True, rms_norm_eps=LLAMA.norm_eps,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(
        transformers.LlamaModel(config),
        peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=targets, init_lora_weights=False),
    )
    randomise(theirs)
    trained = [(name, p.requires_grad) for name, p in theirs.named_parameters()]
    # Our layer takes an output bias as well, which attention_bias means for Llama.
    layer: Any = LlamaLayer(dataclasses.replace(LLAMA, out_bias=True))
    wrap(layer, targets, rank=3, alpha=6.0)
    prefix = "base_model.model.layers.0."
    ours = dict(layer.named_parameters())
    twins = {}
    for name, parameter in theirs.named_parameters():
        if name.startswith(prefix):
            key = name.removeprefix(prefix).replace(".base_layer", "").replace(".default", "")
            ours[key].data = parameter.detach().clone()
            twins[key] = parameter
    assert set(twins) == set(ours)
    assert any(grad for _, grad in trained)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    embedded = theirs.base_model.model.embed_tokens(tokens).detach()
    theirs.base_model.model.norm = nn.Identity()
    expected, y = theirs(tokens).last_hidden_state, layer(embedded)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    expected.square().mean().backward()
    y.square().mean().backward()
    for key in (key for key in ours if "lora_" in key):
        torch.testing.assert_close(ours[key].grad, twins[key].grad, rtol=1e-5, atol=1e-5)


def test_initial_values():
    uniforms = uniform(Stream(0, Purpose.INIT), 0, 1, 8 * 400)
    a = initial_adapter("self_attn.q_proj.lora_A.weight", (8, 400), uniforms)
    assert a.shape == (8, 400)
    assert a.dtype == np.float32
    assert 0.0499 < a.max() <= 0.05
    assert -0.05 <= a.min() < -0.0499
    assert a.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    # The bound is that of peft's initialisation.
    reference = torch.empty(8, 400)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert np.abs(a).max() == pytest.approx(reference.abs().max().item(), rel=0.01)
    b = initial_adapter("self_attn.q_proj.lora_B.weight", (400, 8), uniforms)
    assert b.shape == (400, 8)
    assert not b.any()


# ----------------------------------------------------------------------------------------------------- dropout


def masks(first_sample: int = 0, step: int = 5, stage: int = 2, seed: int = 1, p: float = 0.25) -> DropoutMasks:
    return DropoutMasks(seed, stage, step, first_sample, p)


def test_masks_do_not_depend_on_the_split():
    shape = (5, 9)  # an odd number of elements to a sample
    whole = masks()("mlp.down_proj", (6, *shape))
    for first, count in ((0, 1), (1, 2), (3, 3), (5, 1)):
        part = masks(first)("mlp.down_proj", (count, *shape))
        assert torch.equal(part, whole[first : first + count])
    assert torch.equal(masks()("mlp.down_proj", (6, *shape)), whole)


def test_masks_differ_by_everything_that_keys_them():
    drawn = [
        masks()("a", (2, 64)), masks()("b", (2, 64)), masks(step=6)("a", (2, 64)), masks(stage=3)("a", (2, 64)),
        masks(seed=2)("a", (2, 64)), masks(first_sample=2)("a", (2, 64)),
    ]  # fmt: skip
    for i, one in enumerate(drawn):
        assert not torch.equal(one[0], one[1])
        for other in drawn[:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_masks_are_zero_with_the_probability_and_keep_the_mean(p):
    mask = masks(p=p)("a", (4, 50_000))
    assert mask.dtype == torch.float32
    values = mask.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)]))
    assert (mask == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / mask.numel()) ** 0.5)
    halves = mask.view(4, 2, -1).mean((0, 2))
    assert (halves - 1).abs().max() < 6 * (p / (1 - p) / mask.numel()) ** 0.5 * 2**0.5


@pytest.mark.parametrize("kind", [Linear, Conv1D])
@pytest.mark.parametrize("derived", [False, True])
def test_dropout_in_plain_pytorch(kind, derived):
    """y = base(x) + s B A (m x) with the mask that the name and the sample decide; gradients by autograd."""
    module: Any = kind(8, 6, bias=True)
    module.adapt("here", 2, 3.0, 0.25)
    module.masks = masks(p=0.25)
    randomise(module)
    module.double()
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    other = x.detach().clone().requires_grad_()
    twin = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    y = module(Derived(x.tanh(), torch.tanh, (x,)) if derived else x)
    mask = masks(p=0.25)("here", (3, 4, 8)).double()
    given = other.tanh() if derived else other
    weight = twin["weight"] if kind is Conv1D else twin["weight"].T
    expected = given @ weight + twin["bias"]
    expected = expected + 1.5 * (given * mask) @ twin["lora_A.weight"].T @ twin["lora_B.weight"].T
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, twin[name].grad)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_dropout_does_not_depend_on_the_split(name):
    layer = adapted(name, dropout=0.25)
    hidden = hidden_states(requires_grad=False)
    with torch.no_grad():
        set_masks(layer, masks())
        whole = layer(hidden)
        parts = []
        for first, count in ((0, 1), (1, 3)):
            set_masks(layer, masks(first))
            parts.append(layer(hidden[first : first + count]))
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
        set_masks(layer, None)
        evaluated = layer(hidden)
    assert not torch.allclose(evaluated, whole, atol=1e-2)
    plain = adapted(name)
    assert torch.equal(plain(hidden), evaluated)


@pytest.mark.parametrize("name", LAYERS)
def test_backward_uses_the_masks_of_its_forward(name):
    """Though the module has got others meanwhile, as one skeleton serves all layers."""
    layer = adapted(name, dropout=0.25)
    gradients = []
    for later in (masks(), masks(step=6)):
        twin, hidden = copy.deepcopy(layer), hidden_states()
        set_masks(twin, masks())
        loss = twin(hidden).square().sum()
        set_masks(twin, later)
        loss.backward()
        gradients.append([hidden.grad, *(p.grad for p in twin.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_without_dropout_no_masks_are_made():
    def refuse(name: str, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError(name)

    hidden = hidden_states()
    layer = adapted("llama")
    set_masks(layer, refuse)
    layer(hidden).sum().backward()
    dropping = adapted("llama", dropout=0.1)
    set_masks(dropping, refuse)
    with pytest.raises(AssertionError, match=r"self_attn\.q_proj"):
        dropping(hidden)


def test_a_frozen_map_saves_no_input():
    module = random_layer(lambda: Linear(24, 6))
    hidden = hidden_states()
    assert saved_bytes(lambda: module(hidden), module) == hidden.nbytes
    module.weight.requires_grad_(False)
    assert saved_bytes(lambda: module(hidden), module) == 0


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_save_little_for_backward(name):
    """Beside what the layer saves anyway: ``rank`` numbers a token for each adapter, with dropout or without."""
    make, _ = LAYERS[name]
    base = random_layer(make, 0.3)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    hidden = hidden_states(64)
    tokens = 64 * 7
    counts = {}
    for dropout in (0.0, 0.25):
        layer = adapted(name, dropout)
        set_masks(layer, masks())
        counts[dropout] = saved_bytes(lambda layer=layer: layer(hidden), layer) / tokens
    adapters = len(maps_with_adapters(adapted(name)))
    assert counts[0.25] == counts[0.0]
    assert counts[0.0] <= saved_bytes(lambda: base(hidden), base) / tokens + 4 * 3 * adapters
