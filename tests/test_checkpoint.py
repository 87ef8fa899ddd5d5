"""Folders that transformers itself wrote, whole and damaged in every way."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetrain.architectures import checkpoint_name, stage_shapes
from edgetrain.checkpoint import (
    TOKENIZER_FILES,
    Source,
    convert,
    copy_tokenizer,
    open_checkpoint,
    read_config,
    read_tensor_chunks,
)
from edgetrain.errors import BadInput
from edgetrain.spec import LanguageModelSpec

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]

_SIZES = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {"vocab_size": 50, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 16}

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)),
    "llama3": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True, rope_parameters=_LLAMA3)
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

_LLAMA_SPEC = LanguageModelSpec(
    vocab_size=50, width=24, depth=2, heads=6, kv_heads=2, head_dim=4, mlp_width=40, max_length=64, norm_eps=1e-6,
    tied=False,
)  # fmt: skip
_GPT2_SPEC = LanguageModelSpec(
    family="gpt2", architecture="GPT2LMHeadModel", vocab_size=50, width=24, depth=2, heads=3, kv_heads=3, head_dim=8,
    mlp_width=96, max_length=16, norm_eps=1e-5, activation="gelu_new", tied=True,
)  # fmt: skip
_with = dataclasses.replace
SPECS = {
    "llama": _LLAMA_SPEC,
    "llama3": _with(
        _LLAMA_SPEC, tied=True, rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0, rope_low_freq_factor=1.5,
        rope_high_freq_factor=3.0, rope_original_length=32,
    ),
    "llama with all biases": _with(
        _LLAMA_SPEC, head_dim=8, qkv_bias=True, out_bias=True, mlp_bias=True, activation="silu"
    ),
    "mistral": _with(_LLAMA_SPEC, architecture="MistralForCausalLM", sliding_window=16),
    "qwen2": _with(_LLAMA_SPEC, architecture="Qwen2ForCausalLM", qkv_bias=True, tied=True),
    "qwen3": _with(_LLAMA_SPEC, architecture="Qwen3ForCausalLM", head_dim=10, qk_norm=True, norm_eps=1e-5),
    "qwen3 with biases": _with(
        _LLAMA_SPEC, architecture="Qwen3ForCausalLM", head_dim=8, qk_norm=True, qkv_bias=True, out_bias=True,
        sliding_window=9,
    ),
    "gpt2": _GPT2_SPEC,
    "gpt2 untied": _with(_GPT2_SPEC, mlp_width=30, activation="gelu", tied=False),
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


# What transformers wrote


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_read(saved, name):
    assert read_config(saved(name)) == SPECS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_the_bytes_of_transformers(saved, name):
    checkpoint = open_checkpoint(saved(name))
    parameters = dict(make_model(name).named_parameters())
    names = {key: checkpoint_name(checkpoint.model, *key) for key in checkpoint.tensors}
    assert sorted(names.values()) == sorted(parameters)
    for key, source in checkpoint.tensors.items():
        expected = parameters[names[key]].detach().numpy()
        with source.path.open("rb") as file:
            file.seek(source.position)
            assert file.read(source.nbytes) == expected.tobytes()
        assert (source.dtype, source.shape) == ("F32", expected.shape)
        assert values(source).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_half_precision_in_shards(tmp_path, name, dtype, stored):
    model = MODELS[name]().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    parameters = dict(model.named_parameters())
    assert len(checkpoint.tensors) == len(parameters)
    assert len({source.path for source in checkpoint.tensors.values()}) > 2
    for key, source in checkpoint.tensors.items():
        expected = parameters[checkpoint_name(checkpoint.model, *key)].detach()
        assert source.dtype == stored
        assert values(source).tobytes() == expected.float().numpy().tobytes()
        assert values(source, stored).tobytes() == expected.view(torch.int16).numpy().tobytes()


def test_the_first_gpt2_files_have_no_prefix_but_have_masks(gpt2):
    before = {key: values(source) for key, source in open_checkpoint(gpt2).tensors.items()}

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)

    after = open_checkpoint(rewritten(gpt2, rename)).tensors
    assert {key: values(source).tobytes() for key, source in after.items()} == {
        key: value.tobytes() for key, value in before.items()
    }


def test_old_rotary_tables_are_ignored(llama):
    rewritten(llama, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert len(open_checkpoint(llama).tensors) == len(list(make_model("llama").parameters()))


def test_a_tied_matrix_may_be_there_under_either_name_or_both(gpt2):
    embedding = values(open_checkpoint(gpt2).tensors["embedding", "weight"])
    rewritten(gpt2, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert ("output", "weight") not in open_checkpoint(gpt2).tensors
    rewritten(gpt2, lambda t: t.pop("transformer.wte.weight"))
    assert values(open_checkpoint(gpt2).tensors["embedding", "weight"]).tobytes() == embedding.tobytes()


def test_a_tied_matrix_that_is_two_is_refused(gpt2):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    refused(rewritten(gpt2, change), "lm_head.weight differs", "tie_word_embeddings")


def test_the_cache_of_the_hub_is_read_through_its_links(llama, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(llama.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert open_checkpoint(snapshot).model == SPECS["llama"]


# config.json


def test_the_style_before_transformers_5(llama):
    old = ("rope_parameters", "head_dim", "num_key_value_heads", "attention_bias", "tie_word_embeddings")
    config = dict.fromkeys(old, ...) | {
        "rope_theta": 25000,
        "rope_scaling": {"type": "linear", "factor": 2},
        "torch_dtype": "float32",
    }
    expected = _with(_LLAMA_SPEC, kv_heads=6, rope_theta=25000.0, rope_scaling="linear", rope_factor=2.0)
    assert read_config(changed(llama, **config)) == expected


def test_llama3_in_the_old_style(llama):
    scaling = {key: value for key, value in _LLAMA3.items() if key != "rope_theta"}
    config = changed(llama, rope_parameters=..., rope_theta=5e5, rope_scaling=scaling)
    assert read_config(config) == _with(SPECS["llama3"], tied=False)


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gpt2"])
def test_what_a_config_leaves_out_is_what_transformers_takes(saved, tmp_path, name):
    """A config of sizes alone; the size that it says last has to be guessed by both alike."""
    copied = shutil.copytree(saved(name), tmp_path / "model")
    keep = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "max_position_embeddings", "rms_norm_eps", "layer_norm_epsilon", "num_attention_heads",
            "n_embd", "n_layer", "n_head", "n_positions")  # fmt: skip
    path = copied / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key in keep}
    if name != "gpt2":
        config |= {"num_attention_heads": 32, "hidden_size": 64}
    path.write_text(json.dumps(config))
    theirs, ours = transformers.AutoConfig.from_pretrained(copied), read_config(copied)
    assert ours.tied == theirs.tie_word_embeddings
    if name == "gpt2":
        assert (ours.activation, ours.mlp_width) == (theirs.activation_function, 4 * theirs.n_embd)
        return
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or 0)
    assert (ours.rope_theta, ours.rope_scaling) == (theirs.rope_parameters["rope_theta"], "none")
    assert ours.activation == theirs.hidden_act
    shapes = {n: tuple(p.shape) for n, p in transformers.AutoModelForCausalLM.from_config(theirs).named_parameters()}
    stages = stage_shapes(ours).items()
    assert {checkpoint_name(ours, s, t): shape for s, tensors in stages for t, shape in tensors.items()} == shapes


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, ["unsupported architectures", "Qwen3ForCausalLM"]),
        ({"architectures": []}, ["unsupported architectures"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["unsupported architectures"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures is 'LlamaForCausalLM'", "no list"]),
        ({"model_type": "mistral"}, ["model_type is 'mistral'", "'llama'"]),
        ({"quantization_config": {"bits": 4}}, ["unsupported quantization_config", "bits", "before they were"]),
        ({"pretraining_tp": 2}, ["unsupported pretraining_tp 2"]),
        ({"partial_rotary_factor": 0.5}, ["unsupported partial_rotary_factor 0.5"]),
        ({"auto_map": {"AutoModel": "x.Model"}}, ["unsupported auto_map", "code of its own"]),
        ({"pruned_heads": {"0": [1]}}, ["unsupported pruned_heads"]),
        ({"is_encoder_decoder": True}, ["unsupported is_encoder_decoder"]),
        ({"final_logit_softcapping": 30.0}, ["unsupported final_logit_softcapping 30.0"]),
        ({"logits_scaling": 8.0}, ["unsupported logits_scaling"]),
        ({"num_local_experts": 8}, ["unsupported num_local_experts"]),
        ({"attention_scale": 0.5}, ["unsupported attention_scale 0.5"]),
        ({"rotary_dim": 4}, ["unsupported rotary_dim 4"]),
        ({"hidden_act": "gelu"}, ["unsupported hidden_act 'gelu'", "silu"]),
        ({"hidden_act": "relu"}, ["unsupported hidden_act 'relu'", "swish"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["unsupported rope_parameters type 'yarn'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_scaling is", "rope_parameters says something"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters.full_attention"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["rope_parameters.partial_rotary_factor 0.25"]),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, ["rope_parameters.mrope_section"]),
        ({"rope_parameters": {"rope_type": "linear", "type": "default"}}, ["rope_parameters.type"]),
        ({"rope_parameters": {"factor": 8.0}}, ["unsupported rope_parameters.factor 8.0", "names no type"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["has no rope_parameters.factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ["config.json", "rope_factor must be positive"]),
        ({"rope_parameters": {"rope_type": 3}}, ["rope_parameters.rope_type is 3"]),
        ({"rope_parameters": [1]}, ["rope_parameters is [1]"]),
        ({"rope_parameters": _LLAMA3 | {"high_freq_factor": 1.5}}, ["high_freq_factor", "1.5"]),
        ({"rope_parameters": _LLAMA3, "original_max_position_embeddings": 16}, ["original_max_position_embeddings"]),
        ({"rope_theta": 3.0}, ["rope_theta is 3.0", "10000.0"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["unsupported layer_types"]),
        ({"hidden_size": "24"}, ["hidden_size is '24'", "no int"]),
        ({"hidden_size": 24.0}, ["hidden_size is 24.0"]),
        ({"hidden_size": True}, ["hidden_size is True"]),
        ({"hidden_size": None}, ["hidden_size is None"]),
        ({"hidden_size": 2**40}, ["hidden_size", "out of range"]),
        ({"hidden_size": 25, "head_dim": None}, ["num_attention_heads is 6", "25"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["num_attention_heads is 0"]),
        ({"num_key_value_heads": 4}, ["config.json", "6 attention heads cannot share 4"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers is 1000000"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"vocab_size": -3}, ["vocab_size must be at least 1"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps is '1e-5'", "no float"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps is inf"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings is 1", "no bool"]),
        ({"attention_bias": "no"}, ["attention_bias is 'no'"]),
    ],
)  # fmt: skip
def test_what_is_unsupported_or_wrong_is_named(llama, values, parts):
    refused(changed(llama, **values), "config.json", *parts)


@pytest.mark.parametrize(
    "key",
    ["architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
     "intermediate_size", "max_position_embeddings", "rms_norm_eps"],
)  # fmt: skip
def test_a_key_that_must_be_there(llama, key):
    refused(changed(llama, **{key: ...}), f"config.json has no {key}")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"scale_attn_weights": False}, "unsupported scale_attn_weights False"),
        ({"scale_attn_weights": 1}, "unsupported scale_attn_weights 1"),
        ({"scale_attn_by_inverse_layer_idx": True}, "unsupported scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "unsupported reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "unsupported add_cross_attention"),
        ({"activation_function": "quick_gelu"}, "unsupported activation_function 'quick_gelu'"),
        ({"n_head": 5}, "n_head is 5"),
        ({"n_inner": 0}, "mlp_width must be at least 1"),
    ],
)
def test_what_is_unsupported_in_gpt2_is_named(gpt2, values, part):
    refused(changed(gpt2, **values), "config.json", part)


def test_harmless_keys_at_any_value_and_mattering_keys_at_rest(llama):
    harmless = {"pretraining_tp": 1, "quantization_config": None, "partial_rotary_factor": 1.0, "use_cache": False,
                "_name_or_path": "x", "attention_dropout": 0.5, "bos_token_id": [1, 2], "task_specific_params": {},
                "layer_types": ["full_attention"] * 2}  # fmt: skip
    assert read_config(changed(llama, **harmless)) == SPECS["llama"]


FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("mistral", {"sliding_window": None}, 0),
        ("mistral", {"sliding_window": ...}, 4096),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"layer_types": FULL}, "unsupported layer_types"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 0),
        ("qwen2", {"layer_types": ..., "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ("qwen2", {"layer_types": ..., "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, 0),
        ("qwen2", {"layer_types": ..., "max_window_layers": ..., "sliding_window": 16, "use_sliding_window": True}, 0),
        ("qwen2", {"layer_types": ..., "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
         "max_window_layers is 1"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "layer_types": SLIDING}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "layer_types": FULL}, 0),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "layer_types": [FULL[0], SLIDING[0]]},
         "unsupported layer_types"),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": SLIDING[:1]},
         "unsupported layer_types"),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["linear_attention"] * 2},
         "unsupported layer_types"),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": False, "layer_types": SLIDING},
         "unsupported layer_types"),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True}, 0),
    ],
)  # fmt: skip
def test_sliding_windows(saved, tmp_path, name, values, expected):
    folder = changed(shutil.copytree(saved(name), tmp_path / "model"), **values)
    if isinstance(expected, str):
        refused(folder, expected)
    else:
        assert read_config(folder).sliding_window == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "damaged"), (b'{"a": 1', "damaged"), (b"[1]", "holds a list"), (b"\xff\xfe{}", "damaged"),
        (b"[" * 200000, "damaged"), (b'{"vocab_size": ' + b"9" * 5000 + b"}", "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_config(llama, text, part):
    (llama / "config.json").write_bytes(text)
    refused(llama, str(llama / "config.json"), part)


def test_a_config_too_large_is_not_read_whole(llama):
    os.truncate(llama / "config.json", 1 << 32)
    tracemalloc.start()
    refused(llama, "config.json", str(1 << 32), str(16 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_no_config_and_no_folder(llama, tmp_path):
    (llama / "config.json").unlink()
    refused(llama, "config.json", "No such file")
    refused(tmp_path / "absent", "config.json", "No such file")


# Weights


def test_only_pickled_weights(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, "pytorch_model.bin", "safe_serialization=True")


def test_no_weights_at_all(llama):
    (llama / "model.safetensors").rename(llama / "consolidated.safetensors")
    refused(llama, "no weights", "model.safetensors.index.json", "only consolidated.safetensors")
    (llama / "consolidated.safetensors").unlink()
    assert "only" not in str(refused(llama, "no weights"))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor(llama, name):
    shape = list(load_file(llama / "model.safetensors")[name].shape)
    refused(rewritten(llama, lambda tensors: tensors.pop(name)), f"lacks the tensor {name}", str(shape))


def test_a_wrong_shape(llama):
    name = "model.layers.0.self_attn.k_proj.weight"
    refused(rewritten(llama, lambda t: t.update({name: torch.ones(24, 8)})), name, "[24, 8]", "[8, 24]")


def test_a_transposed_config_of_another_model(llama):
    refused(changed(llama, vocab_size=51), "model.embed_tokens.weight", "[50, 24]", "[51, 24]")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8")])
def test_a_wrong_type(llama, dtype, name):
    refused(rewritten(llama, lambda t: t.update({"model.norm.weight": torch.ones(24).to(dtype)})),
            "model.norm.weight", name, "BF16")  # fmt: skip


def test_unknown_tensors(llama, gpt2_deeper):
    extra = {f"model.layers.0.self_attn.{n}_proj.bias": torch.ones(24) for n in "abcd"}
    refused(rewritten(llama, lambda t: t.update(extra)), "model.safetensors", "self_attn.a_proj.bias", "and 1 more")
    refused(gpt2_deeper, "transformer.h.2.attn.c_attn.bias")


@pytest.fixture
def gpt2_deeper(saved, tmp_path):
    """A layer's bias more than config.json says, with a name that ends like that of a known buffer."""
    folder = shutil.copytree(saved("gpt2"), tmp_path / "deeper")
    return rewritten(folder, lambda t: t.update({"transformer.h.2.attn.c_attn.bias": torch.ones(72)}))


def test_a_header_larger_than_the_file(llama):
    path = llama / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(llama, "model.safetensors", str(2**40))


def test_a_truncated_file(llama):
    path = llama / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(llama, "model.safetensors", "not complete", str(path.stat().st_size))


@pytest.mark.parametrize("begin", [-4, 4, 2**50])
def test_offsets_that_overlap_or_leave_the_file(llama, begin):
    path = llama / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    offsets = header["model.norm.weight"]["data_offsets"]
    offsets[:] = [offset + begin for offset in offsets]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(llama, "model.safetensors", "damaged")


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    make_model("llama").save_pretrained(folder, max_shard_size="8KB")
    return folder


def reindexed(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return folder


def test_a_missing_shard(sharded):
    name = "model-00002-of"
    next(sharded.glob(f"{name}*")).unlink()
    refused(sharded, name, "is missing")


@pytest.mark.parametrize("form", ["absolute", "up", "link"])
def test_a_shard_outside_the_folder(sharded, tmp_path, form):
    shard = next(sharded.glob("model-00001-*"))
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    entry = {"absolute": str(outside), "up": "../outside.safetensors", "link": shard.name}[form]
    if form == "link":
        shard.symlink_to(outside)
    reindexed(sharded, lambda m: m.update({k: entry for k, v in m.items() if v == shard.name}))
    refused(sharded, "outside the folder", entry)


def test_a_way_out_of_the_folder_and_back_is_refused(sharded):
    name = next(sharded.glob("model-00001-*")).name
    entry = f"../{sharded.name}/{name}"
    reindexed(sharded, lambda m: m.update({k: entry for k, v in m.items() if v == name}))
    refused(sharded, "outside the folder", entry)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_for_any_file(llama, tmp_path, name):
    (llama / name).rename(tmp_path / name)
    (llama / name).symlink_to(tmp_path / name)
    refused(llama, "outside the folder", name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_does_not_hang(llama, name):
    (llama / name).unlink()
    os.mkfifo(llama / name)
    refused(llama, name, "no ordinary file")


def test_a_tensor_missing_from_its_shard(sharded):
    reindexed(sharded, lambda m: m.update({"model.more.weight": m["model.norm.weight"]}))
    refused(sharded, "lacks the tensor model.more.weight", "of-0")


def test_a_tensor_that_the_index_does_not_name(sharded):
    reindexed(sharded, lambda m: m.pop("model.norm.weight"))
    refused(sharded, "model.norm.weight", "nowhere")


def test_a_tensor_in_two_shards(sharded):
    shards = sorted(sharded.glob("model-*"))
    save_file(load_file(shards[0]) | {"model.norm.weight": torch.ones(24)}, shards[0])
    refused(sharded, shards[0].name, "model.norm.weight", "says is in")


@pytest.mark.parametrize("weight_map", [None, [], {"lm_head.weight": 3}, {"lm_head.weight": ["a"]}])
def test_a_damaged_index(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(sharded, "index.json is damaged", "weight_map")


@pytest.mark.parametrize("name", ["a\0b", "", ".", "x" * 300])
def test_names_of_shards_that_are_none(sharded, name):
    reindexed(sharded, lambda m: m.update({"model.norm.weight": name}))
    refused(sharded)


# Values


def test_conversions_are_those_of_torch():
    """Every pattern of 16 bits, and float32 values around every border of rounding."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    middles = (patterns.astype(np.uint32) << 16).view(np.float32)
    near = [(middles.view(np.uint32) + np.uint32(k)).view(np.float32) for k in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    wide = np.concatenate([*near, np.random.default_rng(0).standard_normal(1000, np.float32)])
    for stored, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        narrow = torch.from_numpy(patterns.view(np.int16)).view(kind)
        ours = convert(patterns if stored == "BF16" else patterns.view(np.float16), stored, "F32")
        assert np.array_equal(ours, narrow.float().numpy(), equal_nan=True)
        theirs = torch.from_numpy(wide).to(kind)
        fits = (theirs.isfinite() | ~torch.from_numpy(wide).isfinite()).numpy()
        assert 0 < (~fits).sum() < len(wide)
        ours = convert(wide[fits], "F32", stored).view(np.int16)
        numbers = ~np.isnan(wide[fits])
        assert np.array_equal(ours[numbers], theirs.view(torch.int16).numpy()[fits][numbers])
        assert np.isnan(
            convert(ours.view(patterns.dtype if stored == "BF16" else np.float16)[~numbers], stored, "F32")
        ).all()
        with pytest.raises(OverflowError, match=f"too large for {stored}"):
            convert(wide[~fits][:1], "F32", stored)


def test_between_the_two_half_precisions():
    halves = torch.tensor([1.0, -2.5, 0.1, 65504.0, 1e-7, float("inf")], dtype=torch.float16)
    ours = convert(halves.numpy(), "F16", "BF16")
    assert ours.tobytes() == halves.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    back = convert(ours[:3], "BF16", "F16")
    assert back.tobytes() == halves.to(torch.bfloat16)[:3].to(torch.float16).numpy().tobytes()


@pytest.mark.parametrize("chunk", [1, 7, 24, 1200, 10**6])
def test_chunks_of_any_size(saved, chunk):
    source = open_checkpoint(saved("llama")).tensors["embedding", "weight"]
    chunks = list(read_tensor_chunks(source, "F32", chunk))
    assert [len(c) for c in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    assert np.concatenate(chunks).tobytes() == make_model("llama").model.embed_tokens.weight.detach().numpy().tobytes()


def test_values_too_large_for_the_type_are_named(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(np.float32([1, 70000]).tobytes())
    with pytest.raises(BadInput, match="70000 is too large for F16"):
        list(read_tensor_chunks(Source(path, 0, 8, "F32", (2,)), "F16", 10))


def test_a_file_that_shrank_after_it_was_opened(llama):
    source = open_checkpoint(llama).tensors["head", "norm.weight"]
    os.truncate(source.path, source.position + 5)
    with pytest.raises(BadInput, match=re.escape(str(source.path))):
        list(read_tensor_chunks(source, "F32", 10))


def test_memory_is_that_of_chunks(tmp_path):
    path, count = tmp_path / "x", 8 << 20
    path.touch()
    os.truncate(path, 2 * count)
    tracemalloc.start()
    total = sum(
        len(chunk) for chunk in read_tensor_chunks(Source(path, 0, 2 * count, "BF16", (count,)), "F32", 1 << 14)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == count
    assert peak < 1 << 19


# Tokenizer files


def test_the_files_beside_the_weights_are_copied(llama, tmp_path):
    contents = {name: os.urandom(5 + n) for n, name in enumerate(TOKENIZER_FILES) if name != "vocab.json"}
    for name, content in contents.items():
        (llama / name).write_bytes(content)
    (llama / "notes.txt").write_text("left behind")
    to = tmp_path / "to"
    to.mkdir()
    copies = copy_tokenizer(llama, to)
    assert {path.name: path.read_bytes() for path in to.iterdir()} == contents
    assert sorted(copies) == sorted(to.iterdir())


def test_a_tokenizer_file_too_large_is_refused(llama, tmp_path):
    (llama / "tokenizer.json").touch()
    os.truncate(llama / "tokenizer.json", (256 << 20) + 1)
    with pytest.raises(BadInput, match=r"tokenizer\.json.*268435457"):
        copy_tokenizer(llama, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_secret_is_not_copied_through_a_link(llama, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (llama / "vocab.json").symlink_to(tmp_path / "secret")
    to = tmp_path / "to"
    to.mkdir()
    with pytest.raises(BadInput, match=r"vocab\.json.*outside the folder"):
        copy_tokenizer(llama, to)
    assert list(to.iterdir()) == []
