"""The config.json of transformers: read in old and new styles, and what is unsupported or wrong is named."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from dataclasses import replace

import pytest

from edgetrain.architectures import checkpoint_name, stage_shapes
from edgetrain.checkpoint import read_config
from tests import checkpoints
from tests.checkpoints import LLAMA3, LLAMA_SPEC, MODELS, SPECS, changed, refused, transformers

saved, llama, gpt2 = checkpoints.saved, checkpoints.llama, checkpoints.gpt2


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_read(saved, name):
    assert read_config(saved(name)) == SPECS[name]


def test_the_style_before_transformers_5(llama):
    old = ("rope_parameters", "head_dim", "num_key_value_heads", "attention_bias", "tie_word_embeddings")
    config = dict.fromkeys(old, ...) | {
        "rope_theta": 25000,
        "rope_scaling": {"type": "linear", "factor": 2},
        "torch_dtype": "float32",
    }
    expected = replace(LLAMA_SPEC, kv_heads=6, rope_theta=25000.0, rope_scaling="linear", rope_factor=2.0)
    assert read_config(changed(llama, **config)) == expected


def test_llama3_in_the_old_style(llama):
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    config = changed(llama, rope_parameters=..., rope_theta=5e5, rope_scaling=scaling)
    assert read_config(config) == replace(SPECS["llama3"], tied=False)


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
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.5}}, ["high_freq_factor", "1.5"]),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}, ["original_max_position_embeddings"]),
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
