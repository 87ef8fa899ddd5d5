"""What a session exports for transformers and peft: the bytes that came in or were trained, and equal logits."""

from __future__ import annotations

import json
import os
import re
import shutil
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from edgetrain.architectures import linear_names
from edgetrain.checkpoint import convert
from edgetrain.cli.export import _checked_format, _hf_within
from edgetrain.errors import BudgetBroken, DiskError, SessionCorrupt, SessionLocked, UsageError
from edgetrain.governor import Governor
from edgetrain.session import Session
from edgetrain.spec import Spec, StackDataSpec, StackSpec, TrainSpec
from edgetrain.stages import Stage, exact_stages
from edgetrain.store import disk
from exporters.hf_session import export
from tests.exporters.common import make_session, small_spec
from tests.test_importing import (
    DTYPES,
    MODELS,
    all_files,
    assert_equal,
    cli_error,
    cut_small,
    imported,
    make_model,
    read_model,
    run_cli,
    save_model,
    transformers,
    values_of,
)

TOKENS = torch.arange(36).view(2, 18) * 4


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """(name, dtype) -> a new folder with that model."""
    cut_small(monkeypatch)
    return lambda name="llama tied", dtype="F32": save_model(tmp_path / "base", name, dtype)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def weights(folder: Path) -> dict[str, NDArray[Any]]:
    return {name: values_of(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}


def nothing_at(to: Path) -> bool:
    return not to.exists() and not to.with_name(f".{to.name}.partial").exists()


def trained(session: Session, scale: float = 0.1) -> Session:
    """The session with other values in all that it trains, committed as training would."""

    def values(stage: Stage, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        generator = np.random.default_rng(zlib.crc32(f"{stage.name}.{name}".encode()))
        return generator.standard_normal(shape, np.float32) * np.float32(scale)

    with session.store.lock(["model"]):
        transaction = session.store.transaction("model")
        for stage in exact_stages(session.spec).stages:
            layout = session.layout(stage)
            if not stage.trained:
                continue
            section = bytearray(layout.section_bytes("weight"))
            for tensor in layout.tensors:
                start = layout.offset("weight", tensor.name)
                stored = convert(values(stage, tensor.name, tensor.shape).reshape(-1), "F32", tensor.dtype)
                section[start : start + tensor.nbytes] = stored.tobytes()
            transaction.write(stage.name, "weight", memoryview(section))
            for role in ("m", "v"):
                transaction.write(stage.name, role, memoryview(bytes(layout.section_bytes(role))))
        transaction.commit(session.group_state(0, session.progress(0)))
    return session


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_came_in_goes_out(folder_of, tmp_path, name, dtype):
    folder, to = folder_of(name, dtype), tmp_path / "to"
    result = export(imported(folder, tmp_path / "s"), to)
    assert (result.dtype, list(result.files)) == (dtype, sorted(to.iterdir()))
    original, found = load_file(folder / "model.safetensors"), load_file(to / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == dict.fromkeys(original, DTYPES[dtype])
    assert_equal(weights(to), original)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((to / file).read_text()) == json.loads((folder / file).read_text())
    assert torch.equal(logits(loaded(to)), logits(loaded(folder)))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("changes", [{"exact.train": "last"}, {"exact.embedding": False}])
def test_what_is_frozen_comes_from_where_it_is(folder_of, tmp_path, changes, dtype, copy):
    folder, to = folder_of("llama", dtype), tmp_path / "to"
    session = imported(folder, tmp_path / "s", changes, copy=copy)
    assert any(not stage.trained for stage in exact_stages(session.spec).stages)
    if copy:
        (folder / "model.safetensors").unlink()
    export(session, to)
    assert_equal(weights(to), dict(make_model("llama", dtype).named_parameters()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_trained_goes_out(folder_of, tmp_path, name):
    folder, to = folder_of(name), tmp_path / "to"
    session = trained(imported(folder, tmp_path / "s", {"exact.train": "last"}))
    export(session, to)
    expected = {key: torch.from_numpy(values.copy()) for key, values in read_model(session).items()}
    assert_equal(weights(to), expected)
    original = load_file(folder / "model.safetensors")
    changed = {key for key, values in weights(to).items() if values.tobytes() != values_of(original[key]).tobytes()}
    assert changed == {key for key in original if ".2." in key or ".norm." in key or "ln_f" in key}
    assert not torch.equal(logits(loaded(to)), logits(loaded(folder)))


def test_weights_stored_as_bfloat16_keep_the_type_of_the_import(folder_of, tmp_path):
    session = imported(folder_of(), tmp_path / "s", {"exact.weights": "bf16"})
    rounded = {name: p.bfloat16() for name, p in make_model("llama tied").named_parameters()}
    assert export(session, tmp_path / "fp32").dtype == "F32"
    assert_equal(weights(tmp_path / "fp32"), {name: p.float() for name, p in rounded.items()})
    export(session, tmp_path / "bf16", dtype="BF16")
    assert_equal(weights(tmp_path / "bf16"), rounded)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_another_type(folder_of, tmp_path, dtype):
    to = tmp_path / "to"
    assert export(imported(folder_of("gpt2"), tmp_path / "s"), to, dtype=dtype).dtype == dtype
    assert_equal(weights(to), {n: p.to(DTYPES[dtype]) for n, p in make_model("gpt2").named_parameters()})
    assert loaded(to).dtype == DTYPES[dtype]


@pytest.mark.parametrize("said", [{}, {"torch_dtype": "auto"}, {"dtype": None}, {"dtype": ["float16"]}])
def test_a_config_that_says_no_type(folder_of, tmp_path, said):
    folder = folder_of("llama", "BF16")
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "dtype" not in k}
    (folder / "config.json").write_text(json.dumps(config | said))
    assert export(imported(folder, tmp_path / "s"), tmp_path / "to").dtype == "F32"
    assert_equal(weights(tmp_path / "to"), {n: p.float() for n, p in make_model("llama", "BF16").named_parameters()})


def test_what_was_exported_can_be_imported(folder_of, tmp_path):
    session = trained(imported(folder_of("qwen3"), tmp_path / "s"))
    export(session, tmp_path / "to")
    assert imported(tmp_path / "to", tmp_path / "again").store.digest() == session.store.digest()


# --------------------------------------------------------------------------------------------------------- adapters


def lora_session(folder: Path, path: Path, changes: Mapping[str, Any] | None = None, copy: bool = False) -> Session:
    """Adapters of rank 3 on every linear map, none of them zero."""
    session = imported(folder, path, {"exact.targets": ["q_proj"]} if changes is None else changes, "lora", copy)
    return trained(session, 0.3)


def all_maps(name: str) -> dict[str, Any]:
    family = "c_attn c_proj c_fc" if name == "gpt2" else "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    return {"exact.targets": family.split(), "exact.rank": 3, "exact.alpha": 5.0, "exact.dropout": 0.1}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3"])
def test_peft_computes_what_the_merged_model_does(folder_of, tmp_path, name, copy):
    peft = pytest.importorskip("peft")
    folder = folder_of(name)
    session = lora_session(folder, tmp_path / "s", all_maps(name), copy)
    assert set(session.spec.exact.targets) == set(linear_names(session.spec.language))
    files = export(session, tmp_path / "adapter").files
    assert [path.name for path in files] == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    export(session, tmp_path / "merged", merge=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # factors that are missing, or a wrong fan_in_fan_out
        theirs = logits(peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter").eval())
    ours = logits(loaded(tmp_path / "merged"))
    assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert (theirs - logits(loaded(folder))).abs().max() > 0.1
    # What has no adapter is what it was, byte for byte.
    original = load_file(folder / "model.safetensors")
    changed = {key for key, values in weights(tmp_path / "merged").items()
               if values.tobytes() != values_of(original[key]).tobytes()}  # fmt: skip
    targets = session.spec.exact.targets
    assert changed == {key for key in original if key.endswith(".weight") and key.split(".")[-2] in targets}


def test_the_adapter_names_the_folder_that_was_imported(folder_of, tmp_path, monkeypatch):
    folder_of("llama")
    monkeypatch.chdir(tmp_path)
    session = lora_session(Path("base"), tmp_path / "s")
    export(session, Path("adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16.0, ["q_proj"])
    copied = lora_session(Path("base"), tmp_path / "copied", copy=True)
    export(copied, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "copied" / "model")


def test_weights_in_a_folder_below_the_model(folder_of, tmp_path):
    folder = folder_of("llama")
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts" / "all.safetensors")
    index = dict.fromkeys(load_file(folder / "parts" / "all.safetensors"), "parts/all.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    export(lora_session(folder, tmp_path / "s"), tmp_path / "to")
    config = json.loads((tmp_path / "to" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)


def test_an_adapter_of_a_bfloat16_model(folder_of, tmp_path):
    """The sum is made in float32 and rounded once, whatever the types of its parts."""
    folder = folder_of("llama", "BF16")
    session = lora_session(folder, tmp_path / "s", {"exact.targets": ["q_proj"], "exact.weights": "bf16"})
    assert export(session, tmp_path / "adapter").dtype == "BF16"
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in factors.values()} == {torch.bfloat16}
    assert export(session, tmp_path / "fp32", dtype="F32").dtype == "F32"
    for name, tensor in load_file(tmp_path / "fp32" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, factors[name].float())
    assert export(session, tmp_path / "merged", merge=True).dtype == "BF16"
    expected = {name: p.detach() for name, p in make_model("llama", "BF16").named_parameters()}
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        expected[f"{name}.weight"] = (expected[f"{name}.weight"].double() + 2 * b @ a).bfloat16()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        differing = (found[name] != tensor).float().mean()
        assert differing <= (0.01 if "q_proj" in name else 0), name  # float64 and float32 may round apart


def test_there_must_be_an_adapter_to_merge(folder_of, tmp_path):
    session = imported(folder_of(), tmp_path / "s")
    with pytest.raises(UsageError, match="s has no adapter to merge"):
        export(session, tmp_path / "to", merge=True)
    assert nothing_at(tmp_path / "to")


# --------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("merge", [False, True])
def test_an_existing_folder_is_left_as_it_is(folder_of, tmp_path, merge):
    session = lora_session(folder_of("llama"), tmp_path / "s")
    export(session, tmp_path / "to", merge=merge)
    before = all_files(tmp_path / "to")
    with pytest.raises(UsageError, match="there already"):
        export(session, tmp_path / "to", merge=merge)
    assert all_files(tmp_path / "to") == before


@pytest.mark.parametrize("merge", [False, True])
def test_training_meanwhile(folder_of, tmp_path, monkeypatch, merge):
    session, to = lora_session(folder_of("llama"), tmp_path / "s"), tmp_path / "to"
    read, commits = session.store.read, []

    def read_while_trained(*arguments: Any) -> None:
        if not commits:
            commits.append(trained(Session.open(tmp_path / "s"), 0.5))
        read(*arguments)

    monkeypatch.setattr(session.store, "read", read_while_trained)
    with pytest.raises(SessionLocked, match="was trained on while it was exported"):
        export(session, to, merge=merge)
    assert commits
    assert nothing_at(to)
    monkeypatch.undo()


@pytest.mark.parametrize("merge", [False, True])
def test_the_last_word_before_it_appears(folder_of, tmp_path, merge):
    session, to = lora_session(folder_of("llama"), tmp_path / "s"), tmp_path / "to"

    def stop() -> None:
        assert (tmp_path / ".to.partial" / ("config.json" if merge else "adapter_config.json")).exists()
        assert not to.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(session, to, merge=merge, check=stop)
    assert nothing_at(to)


def test_a_damaged_slot(folder_of, tmp_path):
    path, to = imported(folder_of("llama"), tmp_path / "s").path, tmp_path / "to"
    slot = tmp_path / "s" / "stages" / "layer001.a.safetensors"
    with slot.open("r+b") as file:
        file.seek(8 + int.from_bytes(slot.read_bytes()[:8], "little"))
        file.write(b"\1\2\3")
    with pytest.raises(SessionCorrupt, match=r"layer001\.a\.safetensors, weight: SHA-256"):
        export(Session.open(path), to)
    assert nothing_at(to)


def test_a_session_that_lost_its_files(folder_of, tmp_path):
    session, to = lora_session(folder_of("llama"), tmp_path / "s"), tmp_path / "to"
    (tmp_path / "s" / "model" / "config.json").unlink()
    with pytest.raises(SessionCorrupt, match=r"s/model/config\.json cannot be read"):
        export(session, to, merge=True)
    assert nothing_at(to)


def test_frozen_weights_that_changed(folder_of, tmp_path):
    folder, to = folder_of("llama"), tmp_path / "to"
    session = lora_session(folder, tmp_path / "s")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    export(session, tmp_path / "adapter")  # needs none of them
    with pytest.raises(SessionCorrupt, match="SHA-256"):
        export(session, to, merge=True)
    assert nothing_at(to)


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk(folder_of, tmp_path, monkeypatch, merge):
    session, to = lora_session(folder_of("llama"), tmp_path / "s"), tmp_path / "to"
    size = sum(path.stat().st_size for path in export(session, tmp_path / "first", merge=merge).files)
    monkeypatch.setattr(disk, "free_bytes", lambda path: size - 1)
    with pytest.raises(DiskError, match=r"disk full: .*/to needs [\d.]+ KiB, and [\d.]+ KiB are free"):
        export(session, to, merge=merge)
    assert nothing_at(to)
    monkeypatch.setattr(disk, "free_bytes", lambda path: size)
    export(session, to, merge=merge)


def test_a_session_that_can_only_be_read(folder_of, tmp_path, monkeypatch):
    """No file of it is opened for writing, and none is made."""
    session = lora_session(folder_of("llama"), tmp_path / "s")
    before, opened = all_files(tmp_path / "s"), os.open

    def only_reading(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        assert not (writes and Path(path).is_relative_to(tmp_path / "s")), path
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", only_reading)
    export(session, tmp_path / "to", merge=True)
    assert all_files(tmp_path / "s") == before


def test_memory_is_that_of_pieces(tmp_path, monkeypatch):
    """A table of 30 MiB and a map of 12 MiB, in the memory of pieces of 1 MiB."""
    config = transformers.LlamaConfig(
        vocab_size=30000, hidden_size=256, intermediate_size=12000, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    session = lora_session(tmp_path / "base", tmp_path / "s", {"exact.targets": ["up_proj"], "data.length": 16})
    peaks = []
    for dtype in ("F32", "BF16"):
        tracemalloc.start()
        export(session, tmp_path / dtype, merge=True, dtype=dtype)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "F32" / "model.safetensors").stat().st_size > 60 << 20
    assert max(peaks) < 10 << 20, peaks


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def lora(tmp_path) -> Path:
    """A session whose tables are cut as the command cuts them."""
    return lora_session(save_model(tmp_path / "base", "llama", "F32"), tmp_path / "s").path


_WATCHED = """
import sys
sys.argv[0] = "edgetrain"
from edgetrain.cli.main import main
main.main(standalone_mode=False)
print([name for name in ("torch", "transformers", "safetensors", "onnx") if name in sys.modules])
"""


def test_the_command(lora, tmp_path):
    done = run_cli("export", lora, "--to", tmp_path / "a", "--format", "hf", "--json", code=_WATCHED)
    assert done.returncode == 0, done.stderr
    text, modules = done.stdout.splitlines()
    assert modules == "[]"
    value, files = json.loads(text), sorted((tmp_path / "a").iterdir())
    peak_bytes = value.pop("peak_bytes")
    assert 20 << 20 < peak_bytes < 100 << 20
    assert value == {
        "session": str(lora), "format": "hf", "dtype": "fp32", "files": list(map(str, files)),
        "bytes": sum(path.stat().st_size for path in files),
    }  # fmt: skip
    merged = ["export", lora, "--to", tmp_path / "m", "--format", "hf", "--merge", "--dtype", "bf16"]
    # What numpy reserves for products must have been reserved before: the room that this budget leaves is less.
    done = run_cli(*merged, "--memory-budget", peak_bytes + (24 << 20), code=_WATCHED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"{tmp_path / 'm' / 'model.safetensors'}  " in done.stdout
    export(Session.open(lora), tmp_path / "same", merge=True, dtype="BF16")
    assert all_files(tmp_path / "m") == all_files(tmp_path / "same")


def test_a_budget_that_is_too_small(lora, tmp_path):
    options = ["export", lora, "--to", tmp_path / "to", "--format", "hf", "--merge"]
    said = cli_error(3, *options, "--memory-budget", "40MiB")
    assert "40.0 MiB are too little" in said
    assert nothing_at(tmp_path / "to")
    (lora / "plan.json").write_text(json.dumps({"budget_bytes": 40 << 20}))
    assert "40.0 MiB are too little" in cli_error(3, *options)
    assert nothing_at(tmp_path / "to")
    enough = re.findall(r"--memory-budget (\d+MiB)", said)[-1]
    assert run_cli(*options, "--memory-budget", enough).returncode == 0


def test_a_budget_that_was_broken_on_the_way(lora, tmp_path, monkeypatch):
    def broken(governor: Governor) -> None:
        raise BudgetBroken(f"over {governor.budget_bytes}")

    monkeypatch.setattr(Governor, "check", broken)
    with pytest.raises(BudgetBroken, match=f"over {1 << 40}"):
        _hf_within(Session.open(lora), tmp_path / "to", True, None, 1 << 40)
    assert nothing_at(tmp_path / "to")


def test_options_that_do_not_fit(lora, tmp_path):
    to = ["--to", tmp_path / "to"]
    assert "--dtype is no option of --format onnx" in cli_error(2, "export", lora, *to, "--dtype", "bf16")
    assert "--int8 is no option of --format hf" in cli_error(2, "export", lora, *to, "--format", "hf", "--int8")
    assert "--single-file is no option of --format hf" in cli_error(
        2, "export", lora, *to, "--format", "hf", "--single-file"
    )
    assert "'fp8'" in cli_error(2, "export", lora, *to, "--format", "hf", "--dtype", "fp8")
    classifier = make_session(tmp_path / "c", small_spec()).path
    assert "has no adapter to merge" in cli_error(2, "export", classifier, *to, "--merge")
    assert "--dtype is no option of --format onnx" in cli_error(2, "export", classifier, *to, "--dtype", "bf16")
    assert "Use --format onnx" in cli_error(2, "export", classifier, *to, "--format", "hf")
    assert nothing_at(tmp_path / "to")


def test_a_model_of_ones_own_leaves_as_onnx_alone():
    spec = Spec(data=StackDataSpec(), model=StackSpec(), train=TrainSpec(objective="exact"))
    for kind in ("hf", "ort-training"):
        with pytest.raises(UsageError, match="has no export of the format"):
            _checked_format(spec, kind)
    assert [_checked_format(spec, kind) for kind in (None, "onnx")] == ["onnx", "onnx"]


def test_a_base_that_was_moved(lora, tmp_path):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    told = cli_error(4, "export", lora, "--to", tmp_path / "to", "--format", "hf")
    assert "model.safetensors is missing" in told
    assert "put it back" in told
