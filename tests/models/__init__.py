"""What the tests of language models share: binding a skeleton as the engine does, and counting what autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        module = make()
    assert all(p.is_meta for p in module.parameters())
    return module


def bind(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Every parameter of ``module`` becomes the one of that name."""
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in parameters.items()}
    for dotted, parameter in parameters.items():
        owner, _, name = dotted.rpartition(".")
        setattr(module.get_submodule(owner), name, parameter)


def parameters_below(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Copies of all parameters whose name begins with ``prefix``, named from there on, without gradients."""
    return {
        name.removeprefix(prefix): nn.Parameter(parameter.detach().clone())
        for name, parameter in module.named_parameters()
        if name.startswith(prefix)
    }


def randomise(module: nn.Module, scale: float = 0.3) -> None:
    """Norms and biases too, so that nothing is hidden by a one or a zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * scale
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = values + 1 if is_norm else values


def random_layer(make: Callable[[], nn.Module], scale: float = 0.05) -> Any:
    layer = make()
    randomise(layer, scale)
    return layer


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes of all distinct storages that autograd saves while ``run`` goes forward; parameters don't count."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
