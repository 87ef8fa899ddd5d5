"""config.json of a Hugging Face folder -> LanguageModelSpec.

What a config leaves out has the value that transformers' configuration class of the architecture gives it, sizes
excepted: those must be there. What would change the function that the model computes and isn't supported is refused
by name. Dropout isn't part of that function: it is read by nobody here, and fine-tuning applies none.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrain.checkpoint.files import CONFIG, read_object
from edgetrain.errors import BadInput, UsageError
from edgetrain.spec import LanguageModelSpec

_MAX_DEPTH = 1000
"""Names and shapes of all layers are listed before any file confirms their number."""
_MAX_SIZE = 2**31


@dataclass(frozen=True)
class _Architecture:
    """What differs between the configuration classes of transformers: ``None`` is their None."""

    model_type: str
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    sliding_window: int | None = None


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("llama"),
    "MistralForCausalLM": _Architecture("mistral", kv_heads=8, sliding_window=4096),
    "Qwen2ForCausalLM": _Architecture("qwen2", kv_heads=32, sliding_window=4096),
    "Qwen3ForCausalLM": _Architecture("qwen3", kv_heads=32, head_dim=128, sliding_window=4096),
    "GPT2LMHeadModel": _Architecture("gpt2"),
}

_GATED = {"silu": "silu", "swish": "silu"}
_ACTIVATIONS = {**_GATED, "gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}

_OFF = (None, False)
_ONE = (None, 1, 1.0)
_MATTERS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "compression_config": (None,), "auto_map": (None,), "pruned_heads": (None, {}),
    "pretraining_tp": (None, 1), "partial_rotary_factor": _ONE, "rotary_pct": _ONE, "rope_ratio": _ONE,
    "is_encoder_decoder": _OFF, "add_cross_attention": _OFF, "use_bidirectional_attention": _OFF,
    "is_causal": (None, True), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,), "alibi": _OFF, "clip_qkv": (None,), "use_mrope": _OFF,
    "use_qk_norm": _OFF, "qk_layernorm": _OFF, "no_rope_layers": (None, []),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "query_pre_attn_scalar": (None,),
    "logit_scale": _ONE, "logits_scaling": _ONE, "embedding_multiplier": _ONE, "residual_multiplier": _ONE,
    "attention_multiplier": (None,), "scale_emb": _ONE, "scale_depth": (None,), "num_experts": (None, 0, 1),
    "attention_scale": _ONE, "rotary_dim": (None,), "logits_soft_cap": (None,), "rope_interleaved": _OFF,
    "num_local_experts": (None, 0, 1), "n_routed_experts": (None, 0),
}  # fmt: skip
"""Keys that change what a model computes, with the values at which they don't."""

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip

_REQUIRED = object()


class _Keys:
    """The keys of a JSON object, each checked for its type when it is asked for."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    def get(self, key: str, kind: type, default: Any = _REQUIRED, nullable: bool = False) -> Any:
        """The value, or ``default`` if the key isn't there; BadInput if it is of another type than ``kind``."""
        value: Any = self.values.get(key, default)
        if value is _REQUIRED:
            raise BadInput(f"{self.path} has no {self._prefix}{key}")
        if value is None and (nullable or default is None):
            return None
        if kind is float and type(value) is int and abs(value) < _MAX_SIZE:
            value = float(value)
        if type(value) is not kind:
            raise self.bad(key, f"which is no {kind.__name__}")
        if (isinstance(value, float) and not math.isfinite(value)) or (
            isinstance(value, int) and abs(value) >= _MAX_SIZE
        ):
            raise self.bad(key, "which is out of range")
        return value

    def bad(self, key: str, why: str) -> BadInput:
        return BadInput(f"{self.path}: {self._prefix}{key} is {reprlib.repr(self.values.get(key))}, {why}")

    def unsupported(self, key: str, hint: str = "") -> BadInput:
        value = reprlib.repr(self.values[key])
        return BadInput(f"{self.path}: unsupported {self._prefix}{key} {value}", hint)


def read_config(folder: Path) -> LanguageModelSpec:
    """What model the folder holds, from its config.json.

    Raises:
        BadInput: the file is missing, damaged or too large; a key is missing or of the wrong type; or the model
            computes something that edgetrain doesn't. Names file and key.
    """
    config = _Keys(folder / CONFIG, read_object(folder, CONFIG))
    name = _architecture_name(config)
    _refuse_what_matters(config)
    try:
        return _gpt2(config) if name == "GPT2LMHeadModel" else _llama(config, name)
    except UsageError as error:
        raise BadInput(f"{config.path}: {error.message}", error.hint) from error


def _architecture_name(config: _Keys) -> str:
    names = config.get("architectures", list)
    supported = f"Supported: {', '.join(_ARCHITECTURES)}."
    if len(names) != 1 or type(names[0]) is not str or names[0] not in _ARCHITECTURES:
        raise config.unsupported("architectures", supported)
    name: str = names[0]
    if config.get("model_type", str) != _ARCHITECTURES[name].model_type:
        raise config.bad("model_type", f"but {name} is of the type {_ARCHITECTURES[name].model_type!r}")
    return name


def _refuse_what_matters(config: _Keys) -> None:
    hints = {
        "quantization_config": "Take the model's weights before they were quantised.",
        "auto_map": "The folder brings code of its own, which is never run. If it is only a copy of what transformers "
        "has under this architecture's name, delete the key.",
    }
    for key, harmless in _MATTERS.items():
        if key in config.values:
            value = config.values[key]
            if not any(type(value) is type(allowed) and value == allowed for allowed in harmless):
                raise config.unsupported(key, hints.get(key, ""))


def _depth(config: _Keys, key: str) -> int:
    depth: int = config.get(key, int)
    if not 1 <= depth <= _MAX_DEPTH:
        raise config.bad(key, f"which is not between 1 and {_MAX_DEPTH}")
    return depth


def _activation(config: _Keys, key: str, default: str, known: Mapping[str, str]) -> Any:
    name = config.get(key, str, default)
    if name not in known:
        raise config.unsupported(key, f"Supported: {', '.join(known)}.")
    return known[name]


def _gpt2(config: _Keys) -> LanguageModelSpec:
    width, heads = config.get("n_embd", int), config.get("n_head", int)
    return LanguageModelSpec(
        family="gpt2",
        architecture="GPT2LMHeadModel",
        vocab_size=config.get("vocab_size", int),
        width=width,
        depth=_depth(config, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(config, "n_head", width, heads),
        mlp_width=_or(config.get("n_inner", int, None), 4 * width),
        max_length=config.get("n_positions", int),
        norm_eps=config.get("layer_norm_epsilon", float),
        activation=_activation(config, "activation_function", "gelu_new", _ACTIVATIONS),
        tied=config.get("tie_word_embeddings", bool, True),
    )


def _llama(config: _Keys, name: Any) -> LanguageModelSpec:
    architecture = _ARCHITECTURES[name]
    width, heads = config.get("hidden_size", int), config.get("num_attention_heads", int)
    kv_heads = config.get("num_key_value_heads", int, architecture.kv_heads, nullable=True)
    head_dim = config.get("head_dim", int, architecture.head_dim)
    depth, max_length = _depth(config, "num_hidden_layers"), config.get("max_position_embeddings", int)
    llama_or_qwen3 = name in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    bias = llama_or_qwen3 and config.get("attention_bias", bool, False)  # transformers reads the key for these alone
    return LanguageModelSpec(
        family="llama",
        architecture=name,
        vocab_size=config.get("vocab_size", int),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=_or(kv_heads, heads),
        head_dim=_head_dim(config, "num_attention_heads", width, heads) if head_dim is None else head_dim,
        mlp_width=config.get("intermediate_size", int),
        max_length=max_length,
        norm_eps=config.get("rms_norm_eps", float),
        activation=_activation(config, "hidden_act", "silu", _GATED),
        tied=config.get("tie_word_embeddings", bool, False),
        qkv_bias=bias or name == "Qwen2ForCausalLM",
        out_bias=bias,
        mlp_bias=name == "LlamaForCausalLM" and config.get("mlp_bias", bool, False),
        qk_norm=name == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(config, architecture, depth),
        **_rope(config, max_length),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _head_dim(config: _Keys, key: str, width: int, heads: int) -> int:
    if heads < 1 or width % heads:
        raise config.bad(key, f"which does not divide the width {width}")
    return width // heads


def _sliding_window(config: _Keys, architecture: _Architecture, depth: int) -> int:
    """The window that every layer has, 0 for none; BadInput where layers differ."""
    types = config.get("layer_types", list, None)
    if architecture.model_type == "llama":
        window, slides = None, [False] * depth
    else:
        window = config.get("sliding_window", int, architecture.sliding_window, nullable=True)
        slides = [window is not None] * depth
        if architecture.model_type != "mistral":
            full_layers = config.get("max_window_layers", int, 28)
            if not config.get("use_sliding_window", bool, False) or window is None:
                slides = [False] * depth
            elif types is not None:
                slides = [kind == "sliding_attention" for kind in types]
            elif 0 < full_layers < depth:
                raise config.bad("max_window_layers", f"so some of {depth} layers have a sliding window: unsupported")
            else:
                slides = [full_layers <= 0] * depth
    if types is not None and types != ["sliding_attention" if slide else "full_attention" for slide in slides]:
        raise config.unsupported("layer_types", "It contradicts the other keys on the sliding window, or is unknown.")
    if len(slides) != depth or any(slides) != all(slides):
        raise config.unsupported("layer_types", "All layers must have the same kind of attention.")
    if not slides[0] or window is None:
        return 0
    if window < 1:
        raise config.bad("sliding_window", "which is no number of tokens")
    return window


def _rope(config: _Keys, max_length: int) -> dict[str, Any]:
    """The rotary fields, from rope_theta and rope_scaling or, since transformers 5, from rope_parameters."""
    scaling = config.get("rope_scaling", dict, None)
    parameters = config.get("rope_parameters", dict, None)
    if scaling and parameters and scaling != parameters:
        raise config.bad("rope_scaling", "and rope_parameters says something else")
    table = "rope_scaling" if scaling else "rope_parameters"
    rope = _Keys(config.path, scaling or parameters or {}, f"{table}.")
    kinds = {rope.get(key, str) for key in ("rope_type", "type") if key in rope.values}
    kind = kinds.pop() if kinds else "default"
    if kinds:
        raise rope.bad("type", f"and {table}.rope_type something else")
    if kind not in ("default", "linear", "llama3"):
        raise BadInput(
            f"{config.path}: unsupported {table} type {reprlib.repr(kind)}", "Supported: default, linear, llama3."
        )
    for key, value in rope.values.items():
        plain = key == "partial_rotary_factor" and type(value) in (int, float) and value == 1
        if key not in _ROPE_KEYS and value is not None and not plain:
            raise rope.unsupported(key)
    theta = _agreed(config, rope, "rope_theta", float)
    fields: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else theta}
    if kind == "default":
        if "factor" in rope.values and rope.values["factor"] not in (None, 1, 1.0):
            raise rope.unsupported("factor", f"{table} names no type that it belongs to: default, linear or llama3.")
        return fields
    fields |= {"rope_scaling": kind, "rope_factor": rope.get("factor", float)}
    if kind == "linear":
        return fields
    low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
    if not 0 < low < high:
        raise rope.bad("high_freq_factor", f"with low_freq_factor {low}: they must be positive and ascend")
    original = _agreed(config, rope, "original_max_position_embeddings", int)
    if original is not None and original < 1:
        raise BadInput(f"{config.path}: original_max_position_embeddings is {original}, which is no length")
    return fields | {
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_length": _or(original, max_length),
    }


def _agreed(config: _Keys, rope: _Keys, key: str, kind: type) -> Any:
    """What config and its table say, or None; versions of transformers prefer the one or the other."""
    outer, inner = config.get(key, kind, None), rope.get(key, kind, None)
    if outer is not None and inner is not None and outer != inner:
        raise config.bad(key, f"but {inner} among the rotary parameters")
    return outer if inner is None else inner
