"""A session made of a model that transformers wrote: what is in it, and what becomes of one that fails."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgetrain import stages
from edgetrain.adapters import lora_targets
from edgetrain.architectures import checkpoint_name, linear_names, stage_shapes, target_tensors
from edgetrain.checkpoint import TOKENIZER_FILES, convert, open_checkpoint
from edgetrain.errors import BadInput, DiskError, SessionCorrupt, SessionLocked, UsageError
from edgetrain.importing import import_checkpoint, spec_of
from edgetrain.recipe import load_recipe
from edgetrain.session import Session
from edgetrain.stages import Stage, exact_stages
from edgetrain.store import disk

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
SHORT = {"data.length": 16}
_START = "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli.main import run; run()"

_SIZES = {
    "vocab_size": 150, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"vocab_size": 150, "n_embd": 24, "n_head": 3, "n_layer": 3, "n_positions": 32}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=10)),
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_VALUES: dict[str, Any] = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}


@functools.cache
def make_model(name: str, dtype: str = "F32") -> Any:
    """A model whose every parameter is random: biases and norms too."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.to(DTYPES[dtype]).eval()


def save_model(folder: Path, name: str, dtype: str) -> Path:
    make_model(name, dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables in stages of 64 rows: two whole ones and one of 22."""
    monkeypatch.setattr(stages, "_CHUNK_BYTES", 1)


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """(name, dtype) -> a new folder with that model."""
    cut_small(monkeypatch)
    return lambda name="llama tied", dtype="F32": save_model(tmp_path / "base", name, dtype)


def imported(
    folder: Path, path: Path, changes: Mapping[str, Any] | None = None, recipe: str = "finetune", copy: bool = False
) -> Session:
    checkpoint = open_checkpoint(folder)
    spec = spec_of(checkpoint, load_recipe(recipe), SHORT | dict(changes or {}))
    return import_checkpoint(checkpoint, path, spec, copy)


def read_stage(session: Session, stage: Stage, role: str) -> dict[str, NDArray[Any]]:
    """A stage's tensors; bfloat16 as its bits."""
    layout = session.layout(stage)
    found = {}
    for tensor in layout.tensors_of(role):
        into = bytearray(tensor.nbytes)
        session.store.read(stage.name, role, memoryview(into), layout.offset(role, tensor.name))
        found[tensor.name] = np.frombuffer(into, _VALUES[tensor.dtype]).reshape(tensor.shape)
    return found


def read_model(session: Session) -> dict[str, NDArray[Any]]:
    """The model's tensors as the session has them, adapters apart, by their names in a checkpoint."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for stage in exact_stages(session.spec).stages:
        if stage.kind != "lora":
            for name, values in read_stage(session, stage, "weight" if stage.trained else "frozen").items():
                key = checkpoint_name(session.spec.language, stage.name.partition(".")[0], name)
                parts.setdefault(key, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def values_of(tensor: torch.Tensor) -> NDArray[Any]:
    """bfloat16 as its bits."""
    detached = tensor.detach()
    return (detached.view(torch.int16) if tensor.dtype == torch.bfloat16 else detached).numpy()


def assert_equal(found: Mapping[str, NDArray[Any]], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].tobytes() == values_of(tensor).tobytes(), name


def is_whole(session: Session) -> bool:
    result = session.store.verify()
    return not any(row.problems for row in result.rows) and result.digest == session.store.digest()


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_cli(*arguments: object, code: str = _START) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def cli_error(exit_code: int, *arguments: object) -> str:
    """What a command says that has to end so."""
    done = run_cli(*arguments)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == exit_code, done.stderr + done.stdout
    assert done.stdout == ""
    return done.stderr


# ------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_every_weight_arrives(folder_of, tmp_path, name, dtype):
    session = imported(folder_of(name, dtype), tmp_path / "s")
    assert_equal(read_model(session), {n: p.float() for n, p in make_model(name, dtype).named_parameters()})
    exact = exact_stages(session.spec)
    assert len(exact.embedding) == 3
    assert (exact.output == exact.embedding) == session.spec.language.tied
    assert all(stage.trained for stage in exact.stages)
    for stage in exact.stages:
        for role in ("m", "v"):
            assert not any(values.any() for values in read_stage(session, stage, role).values())
    assert session.store.verify().digest == session.store.digest()


def test_a_reopened_session_is_the_same(folder_of, tmp_path):
    session = imported(folder_of(), tmp_path / "s")
    again = Session.open(tmp_path / "s")
    assert (again.spec, again.store.digest()) == (session.spec, session.store.digest())
    progress = again.progress(0)
    assert (progress.step, progress.micro_batch, progress.skipped) == (0, 0, ())


def test_what_belongs_to_the_tokenizer_comes_along(folder_of, tmp_path):
    folder = folder_of()
    (folder / "README.md").write_text("not copied")
    session = imported(folder, tmp_path / "s")
    found = all_files(session.model_files)
    assert set(found) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(found) <= set(TOKENIZER_FILES)
    assert all(content == (folder / name).read_bytes() for name, content in found.items())


@pytest.mark.parametrize("recipe", ["finetune", "lora"])
def test_the_digest_is_a_function_of_the_folder_alone(folder_of, tmp_path, recipe):
    folder = folder_of()
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    first = imported(folder, tmp_path / "a", recipe=recipe).store.digest()
    assert imported(folder, tmp_path / "b", recipe=recipe).store.digest() == first
    assert imported(elsewhere, tmp_path / "c", recipe=recipe, copy=True).store.digest() == first
    weights = elsewhere / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert imported(elsewhere, tmp_path / "d", recipe=recipe).store.digest() != first


def test_shards_are_one_model(folder_of, tmp_path):
    whole = imported(folder_of(), tmp_path / "a").store.digest()
    make_model("llama tied").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert imported(tmp_path / "shards", tmp_path / "b").store.digest() == whole


# ------------------------------------------------------------------------------------- weights stored as bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_is_rounded_to_nearest_even(folder_of, tmp_path, name):
    session = imported(folder_of(name), tmp_path / "s", {"exact.weights": "bf16"})
    assert_equal(read_model(session), {n: p.bfloat16() for n, p in make_model(name).named_parameters()})
    for stage in exact_stages(session.spec).stages:
        layout = session.layout(stage)
        assert {tensor.dtype for tensor in layout.tensors_of("weight")} == {"BF16"}
        assert {tensor.dtype for tensor in layout.tensors_of("m")} == {"F32"}


def test_ties_go_to_the_even_neighbour(tmp_path, folder_of):
    """Values half way between two of bfloat16, and one just above."""
    folder = folder_of("llama tied")
    halves = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001, 0x7F7F0000], np.uint32)
    tensor = open_checkpoint(folder).tensors["head", "norm.weight"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.position)
        file.write(halves.tobytes())
    session = imported(folder, tmp_path / "s", {"exact.weights": "bf16"})
    (head,) = exact_stages(session.spec).head.stages
    found = read_stage(session, head, "weight")["norm.weight"]
    assert [hex(bits) for bits in found[:5]] == ["0x3f80", "0x3f82", "0xbf80", "0x3f81", "0x7f7f"]


# -------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_starts_at_the_base(folder_of, tmp_path, name, weights):
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    changes = {"exact.targets": targets, "exact.weights": weights, "exact.rank": 3}
    session = imported(folder_of(name), tmp_path / "s", changes, recipe="lora")
    adapters = [stage for stage in exact_stages(session.spec).stages if stage.kind == "lora"]
    assert len(adapters) == 3
    stored = "BF16" if weights == "bf16" else "F32"
    seen = set()
    for stage in adapters:
        assert {tensor.dtype for tensor in session.layout(stage).tensors} == {stored}
        found = {
            tensor: convert(values.reshape(-1), stored, "F32").reshape(values.shape)
            for tensor, values in read_stage(session, stage, "weight").items()
        }
        assert len(found) == 2 * (3 if name == "gpt2" else 2)
        for tensor, values in found.items():
            if "lora_B" in tensor:
                assert values.shape[1] == 3
                assert not values.any()
                continue
            assert values.shape[0] == 3
            bound = values.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(values).max() <= bound * 1.01
            assert abs(values.mean()) < 0.35 * bound
            seen.add(values.tobytes())
    assert len(seen) == 3 * (3 if name == "gpt2" else 2), "no two alike"
    assert is_whole(session)


def test_frozen_weights_stay_where_they_are(folder_of, tmp_path):
    folder = folder_of("llama", "BF16")
    session = imported(folder, tmp_path / "s", recipe="lora")
    assert_equal(read_model(session), dict(make_model("llama", "BF16").named_parameters()))
    assert all(path.name.split(".")[1] == "lora" for path in (tmp_path / "s" / "stages").iterdir())
    adapters = sum(path.stat().st_size for path in (tmp_path / "s" / "stages").iterdir())
    assert session.store.num_bytes == adapters
    assert is_whole(session)


@pytest.mark.parametrize("train", ["lora", "last"])
def test_a_copy_needs_the_folder_no_more(folder_of, tmp_path, train):
    folder = folder_of("llama", "BF16")
    recipe = "lora" if train == "lora" else "finetune"
    digest = imported(folder, tmp_path / "s", {"exact.train": train}, recipe, copy=True).store.digest()
    shutil.rmtree(folder)
    session = Session.open(tmp_path / "s")
    assert_equal(read_model(session), {n: p.float() for n, p in make_model("llama", "BF16").named_parameters()})
    assert session.store.verify().digest == digest == session.store.digest()


def test_a_folder_that_was_moved(folder_of, tmp_path):
    folder = folder_of()
    imported(folder, tmp_path / "s", recipe="lora")
    folder.rename(tmp_path / "moved")
    with pytest.raises(SessionCorrupt, match=r"base/model\.safetensors is missing\n.*imported from: put it back"):
        Session.open(tmp_path / "s")
    (tmp_path / "moved").rename(folder)
    assert is_whole(Session.open(tmp_path / "s"))


def test_a_file_that_was_cut_short(folder_of, tmp_path):
    folder = folder_of()
    imported(folder, tmp_path / "s", recipe="lora")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    with pytest.raises(SessionCorrupt, match=rf"model\.safetensors has {weights.stat().st_size} bytes; .* ends at"):
        Session.open(tmp_path / "s")


def test_a_file_that_was_changed(folder_of, tmp_path):
    folder = folder_of()
    imported(folder, tmp_path / "s", recipe="lora")
    head = open_checkpoint(folder).tensors["head", "norm.weight"]
    with head.path.open("r+b") as file:
        file.seek(head.position)
        file.write(b"\1\2\3")
    session = Session.open(tmp_path / "s")
    assert [row.stage for row in session.store.verify().rows if row.problems] == ["head"]
    with pytest.raises(SessionCorrupt, match="SHA-256"):
        read_model(session)


# -------------------------------------------------------------------------------------------------------- refusals


def refused(folder: Path, changes: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        spec_of(open_checkpoint(folder), load_recipe("lora") if recipe is None else recipe, SHORT | dict(changes))
    return str(caught.value)


def test_what_cannot_be_trained(folder_of):
    folder = folder_of()
    told = refused(folder, {"exact.targets": ["q_proj", "query"]})
    assert "'query'" in told
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in told
    assert "no [model]" in refused(folder, {}, load_recipe("lora") | {"model": {"width": 64}})
    assert "no [model]" in refused(folder, {"model.tied": False})
    assert "exact objective" in refused(folder, {"train.objective": "diffusion_blocks"})
    assert "at most 64" in refused(folder, {"data.length": 65})
    assert "has 3 layers" in refused(folder, {"exact.train": "last", "exact.last_layers": 4})
    assert "did you mean 'exact.rank'" in refused(folder, {"exact.ranc": 4})


@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_the_lora_recipe_adapts_every_linear_map(folder_of, tmp_path, name):
    session = imported(folder_of(name), tmp_path / "s", recipe="lora")
    assert lora_targets(session.spec) == linear_names(session.spec.language)
    names = {tensor.name for stage in exact_stages(session.spec).stages if stage.trained
             for tensor in session.layout(stage).tensors}  # fmt: skip
    expected = {tensor.removesuffix(".weight") for target in linear_names(session.spec.language)
                for tensor in target_tensors(session.spec.language, target)}  # fmt: skip
    assert {name.rsplit(".lora_", 1)[0] for name in names} == expected


def test_an_existing_session_is_left_as_it_is(folder_of, tmp_path):
    folder = folder_of()
    imported(folder, tmp_path / "s", recipe="lora")
    before = all_files(tmp_path / "s")
    for marker in (False, True):  # one that a kill left, at the very end
        if marker:
            (tmp_path / "s" / "session.creating").touch()
            before["session.creating"] = b""
        with pytest.raises(UsageError, match="s is a session already"):
            imported(folder, tmp_path / "s")
        assert all_files(tmp_path / "s") == before


def test_a_folder_with_something_else_is_left_as_it_is(folder_of, tmp_path):
    folder = folder_of()
    before = all_files(folder)
    with pytest.raises(UsageError, match="not empty and is no session"):
        imported(folder, folder)
    assert all_files(folder) == before


def test_another_import_into_the_same_folder(folder_of, tmp_path):
    folder, path = folder_of(), tmp_path / "s"
    path.mkdir()
    with (path / "session.creating").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SessionLocked, match="another process is creating"):
            imported(folder, path)
    assert list(all_files(path)) == ["session.creating"]
    imported(folder, path)


def test_too_little_disk(folder_of, tmp_path, monkeypatch):
    folder = folder_of()
    needed = imported(folder, tmp_path / "a").store.num_bytes
    free = disk.free_bytes
    monkeypatch.setattr(disk, "free_bytes", lambda path: needed - 1)
    with pytest.raises(DiskError, match=r"disk full: .*/s needs [\d.]+ [KM]iB, and [\d.]+ [KM]iB are free"):
        imported(folder, tmp_path / "s")
    assert not any((tmp_path / "s").rglob("*.safetensors"))
    assert sum(map(len, all_files(tmp_path / "s").values())) == 0
    assert not Session.exists(tmp_path / "s")
    monkeypatch.setattr(disk, "free_bytes", free)
    assert is_whole(imported(folder, tmp_path / "s"))


def test_a_file_that_shrinks_meanwhile(folder_of, tmp_path):
    folder = folder_of()
    checkpoint = open_checkpoint(folder)
    spec = spec_of(checkpoint, load_recipe("finetune"), SHORT)
    complete = (folder / "model.safetensors").read_bytes()
    os.truncate(folder / "model.safetensors", len(complete) - 4)
    with pytest.raises(BadInput, match="has changed since it was opened"):
        import_checkpoint(checkpoint, tmp_path / "s", spec, copy=False)
    assert not Session.exists(tmp_path / "s")
    (folder / "model.safetensors").write_bytes(complete)
    assert is_whole(imported(folder, tmp_path / "s"))


_KILLED = """
import os, sys
from pathlib import Path
from edgetrain import importing, session, stages
from edgetrain.checkpoint import open_checkpoint
from edgetrain.recipe import load_recipe

folder, path, recipe, where, number = sys.argv[1:]
module, name = where.rsplit(".", 1)
module, calls = sys.modules[module], []
original = getattr(module, name)

def counted(*arguments):
    calls.append(name)
    if len(calls) == int(number):
        os.kill(os.getpid(), 9)
    return original(*arguments)

setattr(module, name, counted)
stages._CHUNK_BYTES = 1
checkpoint = open_checkpoint(Path(folder))
importing.import_checkpoint(
    checkpoint, Path(path), importing.spec_of(checkpoint, load_recipe(recipe), {"data.length": 16}), False
)
"""


@pytest.mark.parametrize(
    ("recipe", "where", "number"),
    [
        ("finetune", "edgetrain.importing.copy_tokenizer", 1),
        ("finetune", "edgetrain.importing.read_tensor_chunks", 20),
        ("lora", "edgetrain.importing.initial_adapter", 30),
        ("finetune", "edgetrain.session._write", 2),
    ],
)
def test_what_a_kill_leaves_is_finished_by_the_next(folder_of, tmp_path, recipe, where, number):
    folder, path = folder_of(), tmp_path / "s"
    assert run_cli(folder, path, recipe, where, number, code=_KILLED).returncode == -9
    assert path.exists()
    with pytest.raises(UsageError, match="is no session"):
        Session.open(path)
    session = imported(folder, path, recipe=recipe)
    assert session.store.verify().digest == imported(folder, tmp_path / "fresh", recipe=recipe).store.digest()
    names = [{str(file.relative_to(made)) for file in made.rglob("*")} for made in (path, tmp_path / "fresh")]
    assert names[0] == names[1]


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command(tmp_path):
    folder = save_model(tmp_path / "base", "llama", "F32")
    text = run_cli("import", folder, tmp_path / "text")
    assert text.returncode == 2, "data.length is 256"
    done = run_cli("import", folder, tmp_path / "s", "--set", "data.length=16", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    session = Session.open(tmp_path / "s")
    count = sum(parameter.numel() for parameter in make_model("llama").parameters())
    assert value == {
        "session": str(tmp_path / "s"), "architecture": "LlamaForCausalLM", "trained_parameters": count,
        "frozen_parameters": 0, "session_bytes": session.store.num_bytes, "digest": session.store.digest(),
    }  # fmt: skip
    options = ["--recipe", "lora", "--set", "data.length=16", "--set", "exact.rank=2", "--data", "some.txt"]
    done = run_cli("import", folder, tmp_path / "l", *options)
    assert done.returncode == 0, done.stderr
    lora = Session.open(tmp_path / "l")
    assert lora.store.digest() in done.stdout
    assert lora.spec.exact.rank == 2
    assert lora.spec.text.source == str(Path("some.txt").absolute())


def test_the_command_refuses(folder_of, tmp_path):
    folder, path = folder_of("llama"), tmp_path / "s"
    short = ["--set", "data.length=16"]
    assert "no linear map 'nope'" in cli_error(
        2, "import", folder, path, "--recipe", "lora", *short, "--set", 'exact.targets=["nope"]'
    )
    assert "vit-digits" not in cli_error(2, "import", folder, path, "--recipe", "vit-digits", *short)
    assert "config.json" in cli_error(7, "import", tmp_path / "none", path, *short)
    assert not path.exists()
    (folder / "model.safetensors").unlink()
    assert "weights" in cli_error(7, "import", folder, path, *short)
    assert not path.exists()


def test_neither_torch_nor_transformers_is_imported(folder_of, tmp_path):
    code = """
import sys
sys.argv[0] = "edgetrain"
from edgetrain.cli.main import main
main.main(standalone_mode=False)
print([name for name in ("torch", "transformers", "safetensors", "tokenizers") if name in sys.modules])
"""
    for recipe in ("finetune", "lora"):
        arguments = ["import", folder_of(), tmp_path / recipe, "--recipe", recipe, "--set", "data.length=16", "--json"]
        done = run_cli(*arguments, code=code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1:] == ["[]"]


def test_every_stage_of_a_model_is_a_stage_of_its_session(folder_of, tmp_path):
    session = imported(folder_of("llama"), tmp_path / "s", recipe="lora")
    names = {stage.name.partition(".")[0] for stage in exact_stages(session.spec).stages}
    assert names == set(stage_shapes(session.spec.language))
