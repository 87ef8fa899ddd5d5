"""What is written is loaded by transformers and peft, and computes the same there."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from edgetrain.architectures import checkpoint_name, linear_names, stores_transposed, target_tensors
from edgetrain.checkpoint import open_checkpoint, read_tensor_chunks
from edgetrain.errors import BadInput, DiskError, SessionLocked, UsageError
from edgetrain.store import disk
from exporters.hf import adapter_name, merged, write_adapter, write_folder
from tests.checkpoints import SPECS, make_model, refused, transformers

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """name -> the folder of a model."""

    def save(name: str) -> Path:
        folder = tmp_path / "base"
        make_model(name).save_pretrained(folder)
        (folder / "tokenizer.json").write_text('{"a": 1}')
        (folder / "README.md").write_text("not copied")
        return folder

    return save


def read_whole(folder: Path) -> tuple[dict[str, Any], Any]:
    """The tensors of a model folder and their chunks, as ``write_folder`` wants them."""
    checkpoint = open_checkpoint(folder)
    sources = {checkpoint_name(checkpoint.model, *key): source for key, source in checkpoint.tensors.items()}
    return {name: (s.dtype, s.shape) for name, s in sources.items()}, lambda name: read_tensor_chunks(
        sources[name], sources[name].dtype, 100
    )


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def left_beside(to: Path) -> list[str]:
    return sorted(path.name for path in to.parent.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3 with biases", "gpt2"])
@pytest.mark.parametrize(("dtype", "max_shard_bytes"), [("F32", 10**9), ("BF16", 8000), ("F16", 10**9)])
def test_transformers_loads_what_was_written(base, tmp_path, name, dtype, max_shard_bytes):
    folder, to = base(name), tmp_path / "new" / "to"
    files = write_folder(to, folder, *read_whole(folder), dtype, max_shard_bytes=max_shard_bytes)
    assert files == sorted(to.iterdir())
    assert left_beside(to) == []
    expected, found = make_model(name).state_dict(), loaded(to).state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key].dtype == KINDS[dtype]
        assert torch.equal(found[key], value.to(KINDS[dtype])), key
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert (len(weights) > 1) == (max_shard_bytes < 10**9)
    assert {path.name for path in files} - {path.name for path in weights} == {
        "config.json", "generation_config.json", "tokenizer.json",
        *(["model.safetensors.index.json"] if len(weights) > 1 else []),
    }  # fmt: skip
    for path in weights:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_shards_are_as_transformers_names_them(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    write_folder(to, folder, *read_whole(folder), "F32", max_shard_bytes=9000)
    index = json.loads((to / "model.safetensors.index.json").read_text())
    shards = sorted(to.glob("*.safetensors"))
    count = len(shards)
    assert [path.name for path in shards] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for path in shards:
        tensors = load_file(path)
        assert {name: index["weight_map"][name] for name in tensors} == dict.fromkeys(tensors, path.name)
        assert sum(t.nbytes for t in tensors.values()) <= 9000
    assert len(index["weight_map"]) == len(list(make_model("llama").parameters()))
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in make_model("llama").parameters())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    tensors, chunks = read_whole(folder)
    write_folder(to, folder, tensors, chunks, "F32", max_shard_bytes=1)
    assert len(list(to.glob("*.safetensors"))) == len(tensors)
    assert open_checkpoint(to).model == SPECS["llama"]


@pytest.mark.parametrize("keys", [{"torch_dtype"}, {"dtype"}, {"torch_dtype", "dtype"}, set()])
def test_the_config_says_what_is_written_in_its_own_words(base, tmp_path, keys):
    folder, to = base("llama"), tmp_path / "to"
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.endswith("dtype")} | dict.fromkeys(keys, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    write_folder(to, folder, *read_whole(folder), "BF16")
    assert json.loads((to / "config.json").read_text()) == config | dict.fromkeys(keys or ["torch_dtype"], "bfloat16")
    assert loaded(to).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["file", "full", "link"])
def test_nothing_is_overwritten(base, tmp_path, kind):
    folder, to = base("llama"), tmp_path / "to"
    if kind == "file":
        to.write_text("mine")
    elif kind == "full":
        to.mkdir()
        (to / "mine").write_text("mine")
    else:
        to.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="to is there already"):
        write_folder(to, folder, *read_whole(folder), "F32")
    assert kind == "link" or (to if kind == "file" else to / "mine").read_text() == "mine"
    assert left_beside(to) == []


def test_an_empty_folder_is_filled(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    to.mkdir()
    write_folder(to, folder, *read_whole(folder), "F32")
    assert open_checkpoint(to).model == SPECS["llama"]


def test_what_a_kill_left_is_swept_up(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    left = tmp_path / ".to.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (left / "odd").write_text("half")
    files = write_folder(to, folder, *read_whole(folder), "F32")
    assert "odd" not in {path.name for path in files}
    assert left_beside(to) == []


def test_two_exports_to_one_place(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    tensors, chunks = read_whole(folder)
    seen = []

    def chunks_of_both(name: str) -> Any:
        if not seen:
            seen.append(name)
            assert not to.exists()
            with pytest.raises(SessionLocked, match="another process"):
                write_folder(to, folder, tensors, chunks, "F32")
        return chunks(name)

    write_folder(to, folder, tensors, chunks_of_both, "F32")
    assert seen
    assert open_checkpoint(to).model == SPECS["llama"]


def test_what_appears_meanwhile_is_not_overwritten(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    tensors, chunks = read_whole(folder)

    def chunks_with_company(name: str) -> Any:
        to.mkdir(exist_ok=True)
        (to / "mine").write_text("mine")
        return chunks(name)

    with pytest.raises(UsageError, match="to is there already"):
        write_folder(to, folder, tensors, chunks_with_company, "F32")
    assert [path.name for path in to.iterdir()] == ["mine"]
    assert left_beside(to) == []


def test_a_full_disk_is_seen_before_anything_is_written(base, tmp_path, monkeypatch):
    folder, to = base("llama"), tmp_path / "to"
    tensors, _ = read_whole(folder)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 5000)
    with pytest.raises(DiskError, match=r"disk full: .*to needs [\d.]+ KiB, and 4.9 KiB are free"):
        write_folder(to, folder, tensors, lambda name: pytest.fail("written"), "F32")
    assert not to.exists()
    assert left_beside(to) == []


def test_what_is_asked_of_the_disk_is_what_is_written(base, tmp_path, monkeypatch):
    """One byte less than the export has is too little, and its own size is enough."""
    folder = base("llama")
    read = read_whole(folder)
    size = sum(path.stat().st_size for path in write_folder(tmp_path / "a", folder, *read, "F32"))
    monkeypatch.setattr(disk, "free_bytes", lambda path: size - 1)
    with pytest.raises(DiskError):
        write_folder(tmp_path / "b", folder, *read, "F32")
    monkeypatch.setattr(disk, "free_bytes", lambda path: size)
    write_folder(tmp_path / "b", folder, *read, "F32")


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + data[:4]])
def test_too_few_or_too_many_values_leave_nothing(base, tmp_path, change):
    folder, to = base("llama"), tmp_path / "to"
    tensors, chunks = read_whole(folder)

    def wrong(name: str) -> Iterator[bytes]:
        data = b"".join(chunk.tobytes() for chunk in chunks(name))
        yield change(data) if name == "model.norm.weight" else data

    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        write_folder(to, folder, tensors, wrong, "F32")
    assert not to.exists()
    assert left_beside(to) == []


def test_an_error_on_the_disk_leaves_nothing(base, tmp_path, monkeypatch):
    folder, to = base("llama"), tmp_path / "to"
    read, pwrite, written = read_whole(folder), os.pwrite, []

    def failing(*arguments: Any) -> int:
        written.append(arguments)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(DiskError, match="disk full"):
        write_folder(to, folder, *read, "F32")
    assert not to.exists()
    assert left_beside(to) == []


def test_a_value_too_large_for_the_type_is_named(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    tensors, chunks = read_whole(folder)

    def large(name: str) -> Iterator[Any]:
        for chunk in chunks(name):
            yield chunk + np.float32(1e6) if name == "lm_head.weight" else chunk

    with pytest.raises(UsageError, match=r"lm_head.weight: 1e\+06 is too large for F16"):
        write_folder(to, folder, tensors, large, "F16")
    assert not to.exists()


def test_a_secret_does_not_leave_through_a_link(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        write_folder(to, folder, *read_whole(folder), "F32")
    assert not to.exists()


def test_memory_is_that_of_chunks(base, tmp_path):
    """A tensor of 32 MiB, in the memory of its chunks of 64 KiB."""
    folder, to = base("llama"), tmp_path / "to"
    chunk = bytes(64 << 10)
    tracemalloc.start()
    write_folder(to, folder, {"x": ("F32", (512, 1 << 14))}, lambda name: (chunk for _ in range(512)), "BF16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (to / "model.safetensors").stat().st_size > 16 << 20
    assert peak < 3 << 20  # a tokenizer file is copied in pieces of 1 MiB


# LoRA


def random_factors(name: str, targets: tuple[str, ...], rank: int) -> dict[str, dict[str, np.ndarray]]:
    """Checkpoint name -> {"A": (rank, in), "B": (out, rank)} of the targets in every layer."""
    spec, generator = SPECS[name], np.random.default_rng(0)
    parameters = dict(make_model(name).named_parameters())
    factors = {}
    for layer in range(spec.depth):
        for tensor in [tensor for target in targets for tensor in target_tensors(spec, target)]:
            weight = checkpoint_name(spec, f"layer{layer:03d}", tensor)
            shape = parameters[weight].shape
            num_out, num_in = reversed(shape) if stores_transposed(spec) else shape
            factors[weight] = {
                "A": generator.standard_normal((rank, num_in), np.float32),
                "B": generator.standard_normal((num_out, rank), np.float32),
            }
    return factors


def export_adapter(to: Path, name: str, base: Path, targets: tuple[str, ...], factors: Any) -> list[Path]:
    arrays = {adapter_name(weight, f): array for weight, pair in factors.items() for f, array in pair.items()}
    return write_adapter(
        to,
        {key: ("F32", array.shape) for key, array in arrays.items()},
        lambda key: [arrays[key].data],
        base_model_name=str(base),
        rank=3,
        alpha=5.0,
        dropout=0.1,
        target_modules=targets,
        fan_in_fan_out=stores_transposed(SPECS[name]),
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("all_targets", [True, False])
def test_peft_loads_the_adapter_and_merges_to_the_same(base, tmp_path, name, all_targets):
    peft = pytest.importorskip("peft")
    folder, to = base(name), tmp_path / "adapter"
    targets = linear_names(SPECS[name]) if all_targets else linear_names(SPECS[name])[:1]
    factors = random_factors(name, targets, 3)
    files = export_adapter(to, name, folder, targets, factors)
    assert [path.name for path in files] == ["adapter_config.json", "adapter_model.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # peft warns of factors that are missing, and of a wrong fan_in_fan_out
        adapted = peft.PeftModel.from_pretrained(loaded(folder), to)
    assert adapted.peft_config["default"].lora_dropout == 0.1
    theirs = dict(adapted.merge_and_unload().named_parameters())
    changed = 0
    for weight, parameter in make_model(name).named_parameters():
        before = parameter.detach().numpy()
        if weight not in factors:
            assert theirs[weight].detach().numpy().tobytes() == before.tobytes()
            continue
        pair = factors[weight]
        pieces = np.split(before.reshape(-1), range(100, before.size, 100))
        ours = np.concatenate(
            list(merged(pieces, before.shape, pair["A"], pair["B"], 5 / 3, fan_in_fan_out=name == "gpt2"))
        )
        np.testing.assert_allclose(
            ours.reshape(before.shape), theirs[weight].detach().numpy(), rtol=1e-6, atol=1e-6 * np.abs(ours).max()
        )
        assert np.abs(ours - before.reshape(-1)).max() > 0.5
        changed += 1
    assert changed == len(factors) > 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("piece", [1, 5, 12, 30, 84, 1000])
def test_merging_in_pieces_of_any_size(piece, transposed):
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((2, 12), np.float32), generator.standard_normal((7, 2), np.float32)
    shape = (12, 7) if transposed else (7, 12)
    weight = generator.standard_normal(shape, np.float32)
    product = b.astype(np.float64) @ a.astype(np.float64)
    expected = weight + 0.25 * (product.T if transposed else product)
    pieces = np.split(weight.reshape(-1), range(piece, 84, piece))
    out = list(merged(pieces, shape, a, b, 0.25, fan_in_fan_out=transposed))
    assert [len(p) for p in out] == [len(p) for p in pieces]
    assert all(p.dtype == np.float32 for p in out)
    np.testing.assert_allclose(np.concatenate(out).reshape(shape), expected, rtol=0, atol=1e-6)


def test_the_sum_is_rounded_once_at_the_end():
    weight, a, b = np.float32([[1.0, 2.0]]), np.float32([[1e-3, 3e-3]]), np.float32([[1.0]])
    exact = torch.from_numpy(weight + 2 * b @ a)
    for dtype, kind in KINDS.items():
        (out,) = merged([weight.reshape(-1)], (1, 2), a, b, 2.0, dtype=dtype)
        size = {4: torch.int32, 2: torch.int16}[out.itemsize]
        assert out.tobytes() == exact.to(kind).view(size).numpy().tobytes()


def test_what_does_not_fit_is_an_error():
    weight, a, b = np.zeros((4, 6), np.float32), np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        list(merged([weight.reshape(-1)], (6, 4), a, b, 1.0))
    with pytest.raises(ValueError, match="do not fit"):
        list(merged([weight.reshape(-1)], (4, 6), a, b[:, :1], 1.0))
    with pytest.raises(ValueError, match="20 values"):
        list(merged([weight.reshape(-1)[:20]], (4, 6), a, b, 1.0))
    with pytest.raises(ValueError, match="48 values or more"):
        list(merged([weight.reshape(-1)] * 2, (4, 6), a, b, 1.0))
    with pytest.raises(OverflowError, match="F16"):
        list(merged([weight.reshape(-1)], (4, 6), a, b, 1e6, dtype="F16"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop(next(iter(t))), "one factor"),
        (lambda t: t.update(other=("F32", (3, 3))), "other"),
        (lambda t: t.update({next(iter(t)): ("F32", (4, 24))}), "rank 3"),
        (lambda t: t.update({next(iter(t)): ("BF16", (3, 24))}), r"\['BF16', 'F32'\]"),
    ],
)
def test_an_adapter_that_is_none_is_an_error(tmp_path, change, part):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {adapter_name(name, "A"): ("F32", (3, 24)), adapter_name(name, "B"): ("F32", (24, 3))}
    change(tensors)
    with pytest.raises(ValueError, match=part):
        write_adapter(
            tmp_path / "to", tensors, lambda key: [bytes(288)], base_model_name="x", rank=3, alpha=1, dropout=0,
            target_modules=["q_proj"], fan_in_fan_out=False,
        )  # fmt: skip
    assert not (tmp_path / "to").exists()


def test_an_adapter_overwrites_nothing(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    factors = random_factors("llama", ("q_proj",), 3)
    export_adapter(to, "llama", folder, ("q_proj",), factors)
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    with pytest.raises(UsageError, match="there already"):
        export_adapter(to, "llama", folder, ("q_proj",), factors)
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    shutil.rmtree(to)
    assert set(load_file_names(export_adapter(to, "llama", folder, ("q_proj",), factors)[1])) == {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{f}.weight" for n in (0, 1) for f in "AB"
    }


def load_file_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_an_adapter_is_no_model(base, tmp_path):
    folder, to = base("llama"), tmp_path / "to"
    export_adapter(to, "llama", folder, ("q_proj",), random_factors("llama", ("q_proj",), 3))
    refused(to, "config.json")
