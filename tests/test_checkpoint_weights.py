"""Weights that are missing, damaged, or of another model than config.json says, in one file or in shards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints
from tests.checkpoints import changed, make_model, refused, rewritten

saved, llama = checkpoints.saved, checkpoints.llama


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
