from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgetrain.architectures import (
    checkpoint_name,
    layer_shapes,
    linear_names,
    stage_shapes,
    stores_transposed,
    target_tensors,
)
from edgetrain.errors import UsageError
from edgetrain.spec import LanguageModelSpec
from tests.checkpoints import MODELS, ROOT, SPECS, make_model

GPT2 = SPECS["gpt2"]
LLAMA = SPECS["llama"]


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_transformers(name):
    spec = SPECS[name]
    expected = {n: tuple(p.shape) for n, p in make_model(name).named_parameters()}
    stages = stage_shapes(spec)
    found = {checkpoint_name(spec, s, t): shape for s, shapes in stages.items() for t, shape in shapes.items()}
    assert found == expected
    assert sum(map(len, stages.values())) == len(expected)


@pytest.mark.parametrize("name", MODELS)
def test_targets_are_the_linear_maps_of_transformers(name):
    spec = SPECS[name]
    linear = [n for n, m in make_model(name).named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    layer = [n.split(".", 3)[3] for n in linear if n.split(".")[2:3] == ["1"]]
    found = [tensor for target in linear_names(spec) for tensor in target_tensors(spec, target)]
    assert sorted(found) == sorted(f"{name}.weight" for name in layer)
    assert set(linear_names(spec)) == {name.split(".")[-1] for name in layer}
    kinds = {type(m).__name__ for n, m in make_model(name).named_modules() if n != "lm_head" and n in linear}
    assert stores_transposed(spec) == (kinds == {"Conv1D"})


def test_stages_come_in_the_order_of_the_data():
    assert list(stage_shapes(GPT2)) == ["embedding", "stem", "layer000", "layer001", "head"]
    assert list(stage_shapes(LLAMA)) == ["embedding", "layer000", "layer001", "head", "output"]


def test_two_maps_of_one_name_are_both_meant():
    assert target_tensors(GPT2, "c_proj") == ("attn.c_proj.weight", "mlp.c_proj.weight")
    assert target_tensors(LLAMA, "q_proj") == ("self_attn.q_proj.weight",)


@pytest.mark.parametrize(("spec", "target"), [(LLAMA, "c_attn"), (GPT2, "q_proj"), (LLAMA, "self_attn"), (LLAMA, "")])
def test_an_unknown_target_is_answered_with_the_known(spec, target):
    with pytest.raises(UsageError, match=f"{spec.architecture} has no linear map '{target}'") as caught:
        target_tensors(spec, target)
    assert all(name in caught.value.hint for name in linear_names(spec))


@pytest.mark.parametrize("stage", ["layer", "layer1", "layers.0", "stem.weight", "lm_head", ""])
def test_an_unknown_stage_is_an_error(stage):
    with pytest.raises(ValueError, match="no stage"):
        checkpoint_name(LLAMA, stage, "weight")


def test_more_than_a_thousand_layers_keep_their_numbers():
    deep = LanguageModelSpec(vocab_size=5, depth=1001)
    assert checkpoint_name(deep, list(stage_shapes(deep))[1001], "x") == "model.layers.1000.x"


def test_biases_are_where_the_spec_says():
    flags = {"qkv_bias": ["q_proj", "k_proj", "v_proj"], "out_bias": ["o_proj"]}
    flags["mlp_bias"] = ["gate_proj", "up_proj", "down_proj"]
    for flag, maps in flags.items():
        shapes = layer_shapes(LanguageModelSpec(vocab_size=5, **{flag: True}))
        assert [name.split(".")[-2] for name in shapes if name.endswith(".bias")] == maps


def test_neither_torch_nor_a_hugging_face_library_is_imported():
    code = (
        "import sys, edgetrain.architectures, edgetrain.checkpoint, exporters.hf\n"
        "print([m for m in ('torch', 'transformers', 'safetensors', 'peft', 'onnx') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
