"""Folders that transformers itself writes, what is in their config.json, and ways to damage them."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetrain.checkpoint import Source, open_checkpoint, read_tensor_chunks
from edgetrain.errors import BadInput
from edgetrain.spec import LanguageModelSpec

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]

_SIZES = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {"vocab_size": 50, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 16}

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)),
    "llama3": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3)
    ),
    "llama with all biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, head_dim=8, attention_bias=True, mlp_bias=True, hidden_act="silu")
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES, sliding_window=16)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=10, rms_norm_eps=1e-5)),
    "qwen3 with biases": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_SIZES, head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=9, max_window_layers=0
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
    "gpt2 untied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**_GPT2, n_inner=30, activation_function="gelu", tie_word_embeddings=False)
    ),
}

LLAMA_SPEC = LanguageModelSpec(
    vocab_size=50, width=24, depth=2, heads=6, kv_heads=2, head_dim=4, mlp_width=40, max_length=64, norm_eps=1e-6,
    tied=False,
)  # fmt: skip
_GPT2_SPEC = LanguageModelSpec(
    family="gpt2", architecture="GPT2LMHeadModel", vocab_size=50, width=24, depth=2, heads=3, kv_heads=3, head_dim=8,
    mlp_width=96, max_length=16, norm_eps=1e-5, activation="gelu_new", tied=True,
)  # fmt: skip
SPECS = {
    "llama": LLAMA_SPEC,
    "llama3": replace(
        LLAMA_SPEC, tied=True, rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0, rope_low_freq_factor=1.5,
        rope_high_freq_factor=3.0, rope_original_length=32,
    ),
    "llama with all biases": replace(
        LLAMA_SPEC, head_dim=8, qkv_bias=True, out_bias=True, mlp_bias=True, activation="silu"
    ),
    "mistral": replace(LLAMA_SPEC, architecture="MistralForCausalLM", sliding_window=16),
    "qwen2": replace(LLAMA_SPEC, architecture="Qwen2ForCausalLM", qkv_bias=True, tied=True),
    "qwen3": replace(LLAMA_SPEC, architecture="Qwen3ForCausalLM", head_dim=10, qk_norm=True, norm_eps=1e-5),
    "qwen3 with biases": replace(
        LLAMA_SPEC, architecture="Qwen3ForCausalLM", head_dim=8, qk_norm=True, qkv_bias=True, out_bias=True,
        sliding_window=9,
    ),
    "gpt2": _GPT2_SPEC,
    "gpt2 untied": replace(_GPT2_SPEC, mlp_width=30, activation="gelu", tied=False),
}  # fmt: skip


@functools.cache
def make_model(name: str) -> Any:
    """A model whose every parameter is random: transformers starts biases at 0 and norms at 1."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(list(MODELS).index(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> a folder with the model, which nobody may change."""

    @functools.cache
    def save(name: str) -> Path:
        folder: Path = tmp_path_factory.mktemp("saved") / name.replace(" ", "_")
        make_model(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def llama(saved: Any, tmp_path: Path) -> Path:
    """A copy of the folder of an untied Llama, to damage."""
    return shutil.copytree(saved("llama"), tmp_path / "model")


@pytest.fixture
def gpt2(saved: Any, tmp_path: Path) -> Path:
    return shutil.copytree(saved("gpt2"), tmp_path / "model")


def changed(folder: Path, **values: Any) -> Path:
    """The folder, with keys of its config.json set, or removed where the value is an ellipsis."""
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not ...}
    path.write_text(json.dumps(config))
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    """The folder, with the dict of its tensors changed by ``change``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def values(source: Source, dtype: str = "F32", chunk: int = 100) -> np.ndarray:
    return np.concatenate(list(read_tensor_chunks(source, dtype, chunk))).reshape(source.shape)


def refused(folder: Path, *parts: str) -> BadInput:
    """The folder is refused with BadInput that has all parts in its text."""
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return caught.value
