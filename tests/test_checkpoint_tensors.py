"""Tensors that transformers wrote: each has its bytes, is converted as torch does, and is read in chunks."""

from __future__ import annotations

import os
import re
import tracemalloc

import numpy as np
import pytest
import torch

from edgetrain.architectures import checkpoint_name
from edgetrain.checkpoint import Source, convert, open_checkpoint, read_tensor_chunks
from edgetrain.errors import BadInput
from tests import checkpoints
from tests.checkpoints import MODELS, make_model, refused, rewritten, values

saved, llama, gpt2 = checkpoints.saved, checkpoints.llama, checkpoints.gpt2


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
