"""The parameters of each language-model family: names as Hugging Face gives them, and shapes. No torch.

A *target* is what LoRA calls a linear map of a layer, "q_proj"; a layer may have several of one name.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UsageError
from edgetrain.spec import LanguageModelSpec, TextModelSpec

Rotary = LanguageModelSpec | TextModelSpec

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

_LAYER = re.compile(r"layer(\d{3,})")


def layer_shapes(model: LanguageModelSpec) -> Shapes:
    """The tensors of one layer, in the order in which data meets them."""
    return _gpt2_layer(model) if model.family == "gpt2" else _llama_layer(model)


def _llama_layer(model: LanguageModelSpec) -> Shapes:
    width, queries, keys = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim

    def linear(name: str, num_in: int, num_out: int, bias: bool) -> Shapes:
        return {f"{name}.weight": (num_out, num_in)} | ({f"{name}.bias": (num_out,)} if bias else {})

    qk_norms: Shapes = {f"self_attn.{name}_norm.weight": (model.head_dim,) for name in "qk"} if model.qk_norm else {}
    return {
        "input_layernorm.weight": (width,),
        **linear("self_attn.q_proj", width, queries, model.qkv_bias),
        **linear("self_attn.k_proj", width, keys, model.qkv_bias),
        **linear("self_attn.v_proj", width, keys, model.qkv_bias),
        **qk_norms,
        **linear("self_attn.o_proj", queries, width, model.out_bias),
        "post_attention_layernorm.weight": (width,),
        **linear("mlp.gate_proj", width, model.mlp_width, model.mlp_bias),
        **linear("mlp.up_proj", width, model.mlp_width, model.mlp_bias),
        **linear("mlp.down_proj", model.mlp_width, width, model.mlp_bias),
    }


def _gpt2_layer(model: LanguageModelSpec) -> Shapes:
    width, hidden = model.width, model.mlp_width

    def conv1d(name: str, num_in: int, num_out: int) -> Shapes:
        """Hugging Face stores GPT-2's linear maps as (in, out)."""
        return {f"{name}.weight": (num_in, num_out), f"{name}.bias": (num_out,)}

    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        **conv1d("attn.c_attn", width, 3 * width),
        **conv1d("attn.c_proj", width, width),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        **conv1d("mlp.c_fc", width, hidden),
        **conv1d("mlp.c_proj", hidden, width),
    }


def stem_shapes(model: LanguageModelSpec) -> Shapes:
    """What lies beside the token table before the first layer: GPT-2's table of positions."""
    return {"wpe.weight": (model.max_length, model.width)} if model.family == "gpt2" else {}


def head_shapes(model: LanguageModelSpec) -> Shapes:
    """The final norm."""
    if model.family == "gpt2":
        return {"ln_f.weight": (model.width,), "ln_f.bias": (model.width,)}
    return {"norm.weight": (model.width,)}


def stage_shapes(model: LanguageModelSpec) -> dict[str, Shapes]:
    """The tensors of every stage in the order of the data: embedding, stem, layer000 .., head, output.

    A stage that the model lacks is left out: the stem without learned positions, the output when it is tied.
    """
    table: Shapes = {"weight": (model.vocab_size, model.width)}
    stem, layer = stem_shapes(model), layer_shapes(model)
    return {
        "embedding": table,
        **({"stem": stem} if stem else {}),
        **{f"layer{number:03d}": layer for number in range(model.depth)},
        "head": head_shapes(model),
        **({} if model.tied else {"output": table}),
    }


def checkpoint_name(model: LanguageModelSpec, stage: str, tensor: str) -> str:
    """What a Hugging Face checkpoint calls a tensor: ("layer003", "ln_1.bias") -> "transformer.h.3.ln_1.bias".

    Raises:
        ValueError: there is no such stage.
    """
    gpt2 = model.family == "gpt2"
    root = "transformer" if gpt2 else "model"
    if stage == "output":
        return f"lm_head.{tensor}"
    if stage == "embedding":
        return f"{root}.{'wte' if gpt2 else 'embed_tokens'}.{tensor}"
    if stage in ("stem", "head"):
        return f"{root}.{tensor}"
    if match := _LAYER.fullmatch(stage):
        return f"{root}.{'h' if gpt2 else 'layers'}.{int(match[1])}.{tensor}"
    raise ValueError(f"a language model has no stage {stage!r}")


def stores_transposed(model: LanguageModelSpec) -> bool:
    """Whether linear maps are stored as (in, out), which peft calls ``fan_in_fan_out``."""
    return model.family == "gpt2"


def linear_names(model: LanguageModelSpec) -> tuple[str, ...]:
    """The targets of a layer: the names of the linear maps that LoRA may add to."""
    linear = (name for name, shape in layer_shapes(model).items() if len(shape) == 2)
    return tuple(dict.fromkeys(_target(name) for name in linear))


def target_tensors(model: LanguageModelSpec, target: str) -> tuple[str, ...]:
    """A layer's weights of one target: "q_proj" -> ("self_attn.q_proj.weight",). GPT-2 has two called "c_proj".

    Raises:
        UsageError: a layer has no such linear map.
    """
    names = linear_names(model)
    if target not in names:
        raise UsageError(f"{model.architecture} has no linear map {target!r}", f"It has {', '.join(names)}.")
    shapes = layer_shapes(model)
    return tuple(name for name, shape in shapes.items() if len(shape) == 2 and _target(name) == target)


def _target(name: str) -> str:
    return name.split(".")[-2]


def inverse_frequencies(model: Rotary) -> NDArray[np.float32]:
    """theta_i (head_dim / 2), in transformers' order of operations (arXiv 2104.09864, equation 15)."""
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    frequencies = np.float32(1) / np.float32(model.rope_theta) ** exponents
    if isinstance(model, LanguageModelSpec) and model.rope_scaling == "linear":
        return frequencies / np.float32(model.rope_factor)
    if isinstance(model, LanguageModelSpec) and model.rope_scaling == "llama3":
        return _llama3(model, frequencies)
    return frequencies


def _llama3(model: LanguageModelSpec, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    """Short wavelengths as they are, long ones stretched by the factor, a smooth passage between (Llama 3.1)."""
    low, high, length = model.rope_low_freq_factor, model.rope_high_freq_factor, model.rope_original_length
    wavelengths = np.float32(2 * math.pi) / frequencies
    stretched = frequencies / np.float32(model.rope_factor)
    smooth = (length / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * stretched + smooth * frequencies
    scaled = np.where(wavelengths > length / low, stretched, between)
    return np.where(wavelengths < length / high, frequencies, scaled).astype(np.float32)
