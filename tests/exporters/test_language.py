"""Language models as ONNX: what onnxruntime computes is what transformers does, by one graph or by several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgetrain.errors import BadInput, BudgetBroken, ParityFailed, UsageError
from edgetrain.session import Session
from edgetrain.vocabulary import put_tokenizer
from exporters import hf_session, language_runtime, parity
from exporters import onnx as emitter
from exporters.language_runtime import LanguageContext, LanguageRunner
from exporters.manifest import MANIFEST, MODEL, MODEL_DATA, WEIGHTS, LanguageManifest, Manifest, layer_file
from exporters.onnx import stage
from tests.exporters.test_hf_session import trained
from tests.test_importing import MODELS, cut_small, imported, run_cli, save_model, transformers

RTOL, ATOL = 1e-4, 1e-5


@pytest.fixture
def session_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """(name, dtype, **how to import) -> a new session of that model."""
    cut_small(monkeypatch)
    return lambda name="llama tied", dtype="F32", **how: imported(
        save_model(tmp_path / "base", name, dtype), tmp_path / "s", **how
    )


def exported(session: Session, to: Path, single_file: bool) -> LanguageRunner:
    with stage(session, to, single_file) as staged:
        staged.publish()
    return LanguageRunner(to)


def random_tokens(vocab_size: int, n: int = 2, length: int = 15) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (n, length))


def reference(folder: Path, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    more = {}
    if mask is not None:
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        more = {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(tokens), **more).logits.numpy()
    return found


@pytest.mark.parametrize("single_file", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(session_of, tmp_path, name, single_file):
    session = session_of(name)
    runner = exported(session, tmp_path / "to", single_file)
    tokens = random_tokens(runner.manifest.vocab_size)
    expected = reference(tmp_path / "base", tokens)
    logits, past = runner.run(tokens, runner.empty(2))
    np.testing.assert_allclose(logits, expected, rtol=RTOL, atol=ATOL)
    assert past[0][0].shape == (2, runner.manifest.kv_heads, 15, runner.manifest.head_dim)
    first, past = runner.run(tokens[:, :4], runner.empty(2))
    second, past = runner.run(tokens[:, 4:5], past)
    third, _ = runner.run(tokens[:, 5:], past)
    np.testing.assert_allclose(np.concatenate([first, second, third], 1), expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_padding_on_the_left_counts_for_nothing(session_of, tmp_path, name):
    runner = exported(session_of(name), tmp_path / "to", True)
    tokens = random_tokens(runner.manifest.vocab_size)
    mask = np.ones(tokens.shape, np.int64)
    mask[0, :6] = 0
    logits, _ = runner.run(tokens, runner.empty(2), mask=mask)
    expected = reference(tmp_path / "base", tokens, mask)
    np.testing.assert_allclose(logits[0, 6:], expected[0, 6:], rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(logits[1], expected[1], rtol=RTOL, atol=ATOL)
    alone, _ = runner.run(tokens[:1, 6:], runner.empty(1))
    np.testing.assert_allclose(logits[0, 6:], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_weights_of_other_types_are_widened(session_of, tmp_path, dtype):
    session = session_of("llama", dtype, changes={"exact.train": "last"})
    runner = exported(session, tmp_path / "to", False)
    tokens = random_tokens(runner.manifest.vocab_size)
    logits, _ = runner.run(tokens, runner.empty(2))
    np.testing.assert_allclose(logits, reference(tmp_path / "base", tokens), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_adapters_are_beside_their_weights(session_of, tmp_path, name):
    """As transformers has the model that they are merged into."""
    from exporters.hf_session import export

    lora = {"exact.rank": 3, "exact.alpha": 6.0, "exact.targets": ["all-linear"]}
    session = trained(session_of(name, recipe="lora", changes=lora))
    runner = exported(session, tmp_path / "to", True)
    export(session, tmp_path / "merged", merge=True)
    tokens = random_tokens(runner.manifest.vocab_size)
    logits, _ = runner.run(tokens, runner.empty(2))
    expected = reference(tmp_path / "merged", tokens)
    np.testing.assert_allclose(logits, expected, rtol=RTOL, atol=1e-4)
    assert np.abs(expected - reference(tmp_path / "base", tokens)).max() > 0.01
    names = {one.name for one in onnx.load(tmp_path / "to" / MODEL, load_external_data=False).graph.initializer}
    assert sum("lora_A" in one for one in names) > 4


def test_names_and_dimensions_are_optimums(session_of, tmp_path):
    session = session_of()
    exported(session, tmp_path / "to", True)
    graph = onnx.load(tmp_path / "to" / MODEL, load_external_data=False).graph

    def dims(values: Any) -> dict[str, list[int | str]]:
        return {
            one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in values
        }  # fmt: skip

    model = session.spec.model
    key_value = ["batch", model.kv_heads, "past", model.head_dim]
    inputs, outputs = dims(graph.input), dims(graph.output)
    assert {"input_ids", "attention_mask", "position_ids"} < inputs.keys()
    assert inputs["attention_mask"] == ["batch", "past + sequence"]
    for number in range(model.depth):
        assert inputs[f"past_key_values.{number}.key"] == inputs[f"past_key_values.{number}.value"] == key_value
        assert outputs[f"present.{number}.key"] == ["batch", model.kv_heads, "past + sequence", model.head_dim]
    assert outputs["logits"] == ["batch", "sequence", model.vocab_size]
    assert {one.version for one in onnx.load(tmp_path / "to" / MODEL, load_external_data=False).opset_import} == {20}


def test_a_tied_table_is_there_once(session_of, tmp_path):
    session = session_of("llama tied")
    for single_file in (False, True):
        to = tmp_path / str(single_file)
        runner = exported(session, to, single_file)
        model = session.spec.model
        trained_bytes = sum(layout.num_elements for layout in session.store.trained_layouts) * 4
        assert runner.weights_bytes < trained_bytes + 64 * 4096 + 4 * model.width
        assert (to / (MODEL_DATA if single_file else WEIGHTS)).stat().st_size == runner.weights_bytes


def test_the_tokenizer_comes_along_and_the_manifest_is_checked(session_of, tmp_path):
    session, to = session_of(), tmp_path / "to"
    runner = exported(session, to, False)
    assert {"tokenizer.json", "config.json"} <= runner.manifest.files.keys()
    assert (to / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    with pytest.raises(BadInput, match="language model"):
        Manifest.read(to)
    found = json.loads((to / MANIFEST).read_text())
    for key, value in (("depth", 0), ("depth", 10**9), ("num_chunks", "3"), ("files", {}), ("single_file", 1)):
        (to / MANIFEST).write_text(json.dumps(found | {key: value}))
        with pytest.raises(BadInput, match="damaged"):
            LanguageManifest.read(to)
    (to / MANIFEST).write_text(json.dumps(found))
    (to / "layer000.onnx").unlink()
    with pytest.raises(BadInput, match="missing"):
        LanguageRunner(to)


@pytest.fixture
def with_reference(readable, tmp_path) -> Iterator[tuple[Session, Path, parity.Reference]]:
    from exporters.reference import compute

    session = imported(readable, tmp_path / "s")
    with (tmp_path / "outputs").open("w+b") as file:
        yield session, tmp_path / "to", compute(session, False, file.fileno(), None)


def test_parity_is_written_and_failing_leaves_nothing(with_reference, monkeypatch):
    session, to, made = with_reference
    with stage(session, to, False) as staged:
        rows = parity.check(session.path, staged.folder, made, None)
        staged.publish()
    kinds = [kind + how for kind in ("present.key", "present.value") for how in ("", ", by parts")]
    assert [(row["file"], row["output"]) for row in rows] == [
        *(("all graphs", "logits" + how) for how in ("", ", by parts")),
        *((layer_file(number), kind) for number in range(session.spec.language.depth) for kind in kinds),
    ]
    assert all(row["passed"] and row["batch_sizes"] == [1, 3] for row in rows)
    assert json.loads((to / parity.PARITY).read_text())["outputs"] == rows

    monkeypatch.setattr(emitter.language._Model, "rotated", lambda self, x: x)
    other = to.with_name("other")
    with pytest.raises(ParityFailed, match="differs"), stage(session, other, False) as staged:
        parity.check(session.path, staged.folder, made, None)
        staged.publish()
    assert not other.exists()


def test_one_graph_at_a_time_or_all_open_is_the_same(session_of, tmp_path):
    exported(session_of(), tmp_path / "to", False)
    tokens = np.arange(6)
    contexts = [LanguageContext(LanguageRunner(tmp_path / "to", budget_bytes=budget)) for budget in (None, 1)]
    assert [context._runner.keeps for context in contexts] == [True, False]
    for part in (tokens[:3], tokens[3:4], tokens[4:]):
        one, other = (context.read(part) for context in contexts)
        np.testing.assert_array_equal(one, other)
    runner = LanguageRunner(tmp_path / "to", budget_bytes=1 << 20)
    with pytest.raises(BudgetBroken, match="generating text"), runner.within("generating text"):
        LanguageContext(runner).read(tokens)


def test_a_long_text_is_read_some_tokens_at_a_time(session_of, tmp_path, monkeypatch):
    exported(session_of(), tmp_path / "to", True)
    tokens = random_tokens(150, 1, 30)[0]
    whole = LanguageContext(LanguageRunner(tmp_path / "to")).read(tokens)
    monkeypatch.setattr(language_runtime, "TOKENS_AT_ONCE", 7)
    lengths = []
    run = LanguageRunner.run
    monkeypatch.setattr(LanguageRunner, "run", lambda self, part, *a, **k: lengths.append(part.shape[1]) or run(
        self, part, *a, **k))  # fmt: skip
    parts = LanguageContext(LanguageRunner(tmp_path / "to")).read(tokens)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert lengths == [7, 7, 7, 7, 2]


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Mistral with a window of 5 tokens, and a tokenizer of bytes."""
    folder: Path = tmp_path_factory.mktemp("mistral") / "base"
    config = transformers.MistralConfig(
        vocab_size=257, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=5, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    put_tokenizer("bytes", folder)
    return folder


@pytest.mark.parametrize("single_file", [False, True])
def test_a_sliding_window(readable, tmp_path, single_file):
    runner = exported(imported(readable, tmp_path / "s"), tmp_path / "to", single_file)
    tokens = random_tokens(257)
    expected = reference(readable, tokens)
    first, past = runner.run(tokens[:, :8], runner.empty(2))
    second, _ = runner.run(tokens[:, 8:], past)
    np.testing.assert_allclose(np.concatenate([first, second], 1), expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("single_file", [False, True])
def test_from_a_session_to_a_text(readable, tmp_path, single_file):
    """By the commands: the text that the export writes is the session's, and torch is not there."""
    session, to = tmp_path / "s", tmp_path / "to"
    imported(readable, session)
    options = ["--single-file"] if single_file else []
    done = run_cli("export", session, "--to", to, "--memory-budget", "500MiB", *options, "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert all(row["passed"] for row in value["parity"])
    assert value["emit_peak_bytes"] < 100 << 20
    texts = []
    for model in (session, to):
        command = ("generate", model, "--prompt", "hello", "--max-tokens", 8, "--memory-budget", "500MiB", "--json")
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        texts.append((found["text"], found["tokens"], found["finish"]))
    assert texts[0] == texts[1]
    assert found["peak_bytes"] < 150 << 20
    done = run_cli("predict", to, "--data", "digits")
    assert done.returncode == 7
    assert "edgetrain generate" in done.stderr


def test_an_imported_model_leaves_without_training_and_without_a_budget(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base", "llama", "F32")
    assert run_cli("import", folder, tmp_path / "s", "--set", "data.length=16").returncode == 0
    done = run_cli("export", tmp_path / "s", "--to", tmp_path / "to", "--single-file", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["budget_bytes"] is None
    assert value["parity"]


@pytest.mark.parametrize("budget", [None, 1])
def test_results_do_not_keep_a_graph_that_is_closed(session_of, tmp_path, budget):
    """What onnxruntime returns is a view of memory that it frees when the last of it is gone."""
    exported(session_of(), tmp_path / "to", False)
    runner = LanguageRunner(tmp_path / "to", budget_bytes=budget)
    _, past = runner.run(random_tokens(150), runner.empty(2))
    assert all(array.flags.owndata == (budget is not None) for pair in past for array in pair)


@pytest.mark.parametrize("storage", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "qwen2"])
def test_an_adapter_is_merged_or_kept_beside(session_of, tmp_path, name, storage):
    """Both compute the same, and so does what --format hf merges."""
    lora = {"exact.rank": 3, "exact.alpha": 6.0, "exact.targets": ["all-linear"]}
    session = trained(session_of(name, recipe="lora", changes=lora))
    tokens, found = random_tokens(session.spec.language.vocab_size), {}
    for merge in (False, True):
        to = tmp_path / f"merge {merge}"
        with stage(session, to, False, storage, merge) as staged:
            staged.publish()
        runner = LanguageRunner(to)
        found[merge], _ = runner.run(tokens, runner.empty(2))
        graph = onnx.load(to / "layer000.onnx", load_external_data=False).graph
        assert any("lora" in one.name for one in graph.initializer) != merge
    hf_session.export(session, tmp_path / "hf", merge=True)
    expected = reference(tmp_path / "hf", tokens)
    rtol, atol = parity.tolerance(storage, expected, True)
    for logits in found.values():
        np.testing.assert_allclose(logits, expected, rtol=rtol, atol=2 * atol)


def test_there_is_nothing_to_merge(session_of, tmp_path):
    with pytest.raises(UsageError, match="no adapter"), stage(session_of(), tmp_path / "to", False, merge=True):
        pass
