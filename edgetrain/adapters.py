"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): their shapes and initial values. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetrain.architectures import layer_shapes, linear_names, stores_transposed, target_tensors
from edgetrain.spec import Spec

ALL_LINEAR = "all-linear"


def lora_targets(spec: Spec) -> tuple[str, ...]:
    """The linear maps that get adapters, by the names that peft gives them, with its defaults and "all-linear"."""
    if spec.exact.targets == (ALL_LINEAR,):
        return linear_names(spec.language)
    return spec.exact.targets or (("c_attn",) if spec.language.family == "gpt2" else ("q_proj", "v_proj"))


def lora_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's adapter: MAP.lora_A.weight (rank, in) and MAP.lora_B.weight (out, rank).

    Raises:
        UsageError: a target is no linear map of the model.
    """
    model, rank = spec.language, spec.exact.rank
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (tensor for target in lora_targets(spec) for tensor in target_tensors(model, target)):
        num_out, num_in = layer_shapes(model)[name][:: -1 if stores_transposed(model) else 1]
        linear = name.removesuffix(".weight")
        shapes[f"{linear}.lora_A.weight"], shapes[f"{linear}.lora_B.weight"] = (rank, num_in), (num_out, rank)
    return shapes


def initial_adapter(name: str, shape: tuple[int, ...], uniforms: NDArray[np.floating]) -> NDArray[np.float32]:
    """Values of ``...lora_A.weight`` or ``...lora_B.weight`` from uniforms in (0, 1), as many as ``shape`` holds.

    A is uniform in +-1 / sqrt(in), which is kaiming_uniform with a = sqrt(5); B is zero: training starts at the base.
    """
    if "lora_B" in name:
        return np.zeros(shape, np.float32)
    return ((2 * uniforms.reshape(shape) - 1) * shape[1] ** -0.5).astype(np.float32)
