"""Generation and evaluation of language models: against transformers, within budgets, and in every way of streaming."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import devices
import edgetrain.stages
from edgetrain import architectures, generation
from edgetrain.checkpoint import open_checkpoint
from edgetrain.data.text import HELD_OUT, open_text
from edgetrain.errors import BadInput, BudgetBroken, UsageError
from edgetrain.generation import Sampling, Text, Writer, choose, generate
from edgetrain.inference import Context, FolderWeights, LanguageModel, SessionWeights, evaluate_language
from edgetrain.models.language import lora_targets
from edgetrain.randomness import Purpose, Stream, uniform
from edgetrain.session import Session
from edgetrain.spec import ExactSpec, LanguageModelSpec, Spec, TextSpec, TrainSpec
from edgetrain.stages import Stage, rows_of_chunk
from edgetrain.store.layout import TensorSpec
from tests.data.text_files import END, SENTENCES, write_tokenizer
from tests.models import randomise

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")

CHUNK_BYTES = edgetrain.stages._CHUNK_BYTES
ROOT = Path(__file__).parents[1]
GREEDY = Sampling()
PROMPT = np.array([5, 17, 3, 99, 140, 3], np.int64)
_LLAMA = {
    "vocab_size": 150, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 150, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
BUILD: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA | more)),
    "llama tied": lambda **more: BUILD["llama"](tie_word_embeddings=True, **more),
    "mistral, window": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_LLAMA, sliding_window=5)),
    "gpt2": lambda **more: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2 | more)),
}


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Tables of three stages, the last one shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edgetrain.stages, "_CHUNK_BYTES", 1)
        assert rows_of_chunk(32) == 64
        yield


@dataclass
class Saved:
    """A model as transformers has it, and its folder."""

    theirs: Any
    folder: Path

    def ours(self, resident: bool = True) -> LanguageModel:
        return opened(FolderWeights(open_checkpoint(self.folder)), resident)


def save(theirs: Any, folder: Path) -> Saved:
    randomise(theirs)
    theirs.tie_weights()
    theirs.eval().save_pretrained(folder)
    return Saved(theirs, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            made[name] = save(BUILD[name](), tmp_path_factory.mktemp("model"))
        return made[name]

    return get


def opened(weights: Any, resident: bool = True) -> LanguageModel:
    model = LanguageModel(weights, devices.open_device("cpu"))
    if resident:
        model._pin(math.inf)
    return model


def tokens_of(model: LanguageModel, count: int, sampling: Sampling = GREEDY) -> list[int]:
    context = Context(model, len(PROMPT) + count)
    return list(generate(context.read, PROMPT, count, frozenset(), sampling))


@torch.no_grad()
def their_tokens(theirs: Any, count: int, pick: Callable[[torch.Tensor, int], int]) -> list[int]:
    """By the whole text anew for each token, without a cache."""
    ids = PROMPT.tolist()
    for _ in range(count):
        ids.append(pick(theirs(torch.tensor([ids])).logits[0, -1], len(ids)))
    return ids[len(PROMPT) :]


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", BUILD)
def test_greedy_tokens_are_those_of_transformers(saved, name):
    theirs = saved(name).theirs
    prompt = torch.from_numpy(PROMPT)[None]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    found = tokens_of(saved(name).ours(), 20)
    assert found == expected[0, len(PROMPT) :].tolist()
    assert len(set(found)) > 3, "nothing to compare"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sampled_tokens_are_those_of_a_plain_reimplementation(saved, name):
    temperature, top_p, seed = 8.0, 0.8, 11

    def pick(logits: torch.Tensor, position: int) -> int:
        p, order = (logits.double() / temperature).softmax(0).sort(descending=True)
        kept = [0]
        while p[kept].sum() < top_p:
            kept.append(len(kept))
        left = uniform(Stream(seed, Purpose.SAMPLING), position, 1)[0, 0] * p[kept].sum()
        for i in kept:
            left -= p[i]
            if left < 0:
                break
        return int(order[i])

    expected = their_tokens(saved(name).theirs, 30, pick)
    sampling = Sampling(temperature, top_p, seed)
    assert tokens_of(saved(name).ours(), 30, sampling) == expected
    assert tokens_of(saved(name).ours(resident=False), 30, sampling) == expected, "same seed, same text"
    assert tokens_of(saved(name).ours(), 30, Sampling(temperature, top_p, seed + 1)) != expected
    assert len(set(expected)) > 15, "nothing is drawn"


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    drawn = [choose(logits, Sampling(1.0, 1.0, 3), i) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.5, 0.15, 0.25], atol=0.03)
    kept = [choose(logits, Sampling(1.0, 0.7, 3), i) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / 4000, [0, 2 / 3, 0, 1 / 3], atol=0.03)
    hotter = [choose(logits, Sampling(2.0, 1.0, 3), i) for i in range(4000)]
    roots = np.sqrt([0.1, 0.5, 0.15, 0.25])
    np.testing.assert_allclose(np.bincount(hotter) / 4000, roots / roots.sum(), atol=0.03)
    assert {choose(logits, Sampling(1.0, 0.4, 3), i) for i in range(50)} == {1}
    assert {choose(logits, Sampling(1e-300, 1.0, 3), i) for i in range(50)} == {1}
    assert choose(logits, Sampling(), 0) == 1


def test_logits_that_are_no_numbers_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match="position 7"):
            choose(np.array([1.0, bad, 2.0], np.float32), Sampling(), 7)


def test_an_end_token_is_the_last(saved):
    model = saved("llama").ours()
    free = tokens_of(model, 20)
    end = free[6]
    stopped = list(generate(Context(model, 26).read, PROMPT, 20, frozenset([end, 149]), Sampling()))
    assert stopped == free[: free.index(end) + 1]
    assert len(stopped) < 20


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_what_is_resident_changes_no_bit(saved, name):
    models = [saved(name).ours(), saved(name).ours(resident=False), saved(name).ours(resident=False)]
    models[2]._pin(sum(models[2]._bytes([unit]) for unit in models[2]._units[:3]))
    assert [len(model._pinned) for model in models] == [len(models[0]._units), 0, 3]
    assert [model._window is None for model in models] == [True, True, True]
    contexts = [Context(model, 20) for model in models]
    for part in (PROMPT, PROMPT[:1], PROMPT[1:2]):
        first, *others = [context.read(part) for context in contexts]
        for other in others:
            np.testing.assert_array_equal(first.view(np.uint32), other.view(np.uint32))
    assert [model._window is None for model in models] == [True, False, False]
    with torch.no_grad():
        text = torch.tensor([[*PROMPT, *PROMPT[:2]]])
        torch.testing.assert_close(
            torch.from_numpy(first), saved(name).theirs(text).logits[0, -1], rtol=1e-4, atol=1e-4
        )


def test_where_memory_runs_out_less_stays_resident(saved, monkeypatch):
    expected = tokens_of(saved("llama").ours(), 10)
    model = saved("llama").ours()
    layer, calls = model.network.layer, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) in (2, 9):  # amid the prompt, and amid a later token
            layer(*args)  # it has appended to its cache
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return layer(*args)

    monkeypatch.setattr(model.network, "layer", failing)
    num_units = len(model._pinned)
    assert tokens_of(model, 10) == expected
    assert len(calls) > 30, "nothing was tried again"
    assert 0 < len(model._pinned) <= num_units // 4 + 1

    def always(*args: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(model.network, "layer", always)
    with pytest.raises(BudgetBroken, match="6 tokens"):
        tokens_of(model, 1)
    assert not model._pinned
    monkeypatch.setattr(model.network, "layer", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        tokens_of(model, 1)


def test_weights_of_half_precision_are_read_as_they_are(saved, tmp_path):
    half = BUILD["llama"]()
    randomise(half)
    half.to(torch.bfloat16).save_pretrained(tmp_path)
    wide = half.float().eval()
    model = opened(FolderWeights(open_checkpoint(tmp_path)), resident=False)
    assert {tensor.dtype for layout in model._layouts.values() for tensor in layout.tensors} == {"BF16"}
    assert tokens_of(model, 12) == their_tokens(wide, 12, lambda logits, _: int(logits.argmax()))


# ----------------------------------------------------------------------------------------------------------- sessions


def make_session(path: Path, saved: Saved, source: Path, **exact: Any) -> Session:
    """A session with the model's weights; adapters are random in both A and B."""
    model = open_checkpoint(saved.folder).model
    spec = Spec(
        model=model,
        data=TextSpec(str(source), length=12, held_out=0.4),
        exact=ExactSpec(**exact),
        train=TrainSpec(objective="exact", batch_size=4, micro_batch=2),
    )
    rows, width = rows_of_chunk(model.width), model.width
    tables = {"": (rows, width), ".last": (model.vocab_size % rows, width)}
    shapes: dict[str, Any] = {
        f"{table}{part}": {"weight": shape} for table in ("embedding", "output") for part, shape in tables.items()
    }
    shapes |= {"layer": architectures.layer_shapes(model), "head": architectures.head_shapes(model)}
    shapes |= {"stem": architectures.stem_shapes(model), "lora": adapter_shapes(spec)}
    generator = np.random.default_rng(3)
    state = saved.theirs.state_dict()

    def initial(stage: Stage, tensor: TensorSpec) -> list[Any]:
        if stage.kind == "lora":
            return [generator.standard_normal(tensor.shape).astype(np.float32) * 0.3]
        whole, _, number = stage.name.partition(".")
        values = state[architectures.checkpoint_name(model, whole, tensor.name)]
        values = values[int(number) * rows :][:rows] if number else values
        if tensor.dtype == "BF16":
            return [values.bfloat16().view(torch.uint16).numpy()]
        return [values.numpy()]

    def prepare() -> None:
        (path / "model").mkdir()
        for file in saved.folder.glob("*.json"):
            (path / "model" / file.name).write_bytes(file.read_bytes())

    return Session.create(path, spec, shapes, initial, prepare=prepare)


def adapter_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    model, found = spec.language, {}
    for target in lora_targets(spec):
        for name in architectures.target_tensors(model, target):
            out, inner = architectures.layer_shapes(model)[name]
            if architectures.stores_transposed(model):
                out, inner = inner, out
            stem = name.removesuffix("weight")
            found |= {f"{stem}lora_A.weight": (spec.exact.rank, inner), f"{stem}lora_B.weight": (out, spec.exact.rank)}
    return found


@torch.no_grad()
def merged(saved: Saved, session: Session) -> Any:
    """A copy of transformers' model with the adapters of the session added to its weights."""
    theirs = type(saved.theirs)(saved.theirs.config)
    theirs.load_state_dict(saved.theirs.state_dict())
    weights, exact = SessionWeights(session), session.spec.exact
    model = session.spec.language
    state = theirs.state_dict()
    num_changed = 0
    for unit in weights.stages.layers:
        stage = unit.stages[1]
        layout = weights.layout(stage)
        section = bytearray(layout.section_bytes("weight"))
        weights.read(stage.name, "weight", memoryview(section))
        values = {
            tensor.name: torch.frombuffer(section, dtype=torch.float32, offset=layout.offset("weight", tensor.name),
                                          count=math.prod(tensor.shape)).view(tensor.shape)
            for tensor in layout.tensors
        }  # fmt: skip
        for name, a in values.items():
            if "lora_A" not in name:
                continue
            change = exact.alpha / exact.rank * values[name.replace("lora_A", "lora_B")] @ a
            change = change.T if architectures.stores_transposed(model) else change
            base = name.removesuffix("lora_A.weight") + "weight"
            state[architectures.checkpoint_name(model, unit.stages[0].name, base)] += change
            num_changed += 1
    targets = lora_targets(session.spec)
    assert num_changed == model.depth * sum(len(architectures.target_tensors(model, target)) for target in targets)
    return theirs.eval()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Four documents that are held out among ten."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{SENTENCES[number % 5]} {number}", "utf-8")
    return folder


@pytest.mark.parametrize(("name", "exact"), [
    ("llama", {}),
    ("llama tied", {"train": "last", "last_layers": 2}),
    ("gpt2", {}),
])  # fmt: skip
def test_a_session_writes_what_its_model_writes(saved, tmp_path, text_file, name, exact):
    session = make_session(tmp_path / "s", saved(name), text_file, **exact)
    again = Session.open(session.path)
    for resident in (True, False):
        assert tokens_of(opened(SessionWeights(again), resident), 12) == tokens_of(saved(name).ours(), 12)


@pytest.mark.parametrize(("name", "targets"), [
    ("llama", ("q_proj", "down_proj")), ("llama tied", ()), ("gpt2", ("c_attn", "c_proj")),
])  # fmt: skip
def test_adapters_of_a_session_are_applied(saved, tmp_path, text_file, name, targets):
    session = make_session(tmp_path / "s", saved(name), text_file, train="lora", rank=4, alpha=6.0, targets=targets)
    theirs = merged(saved(name), session)
    for resident in (True, False):
        model = opened(SessionWeights(session), resident)
        logits = Context(model, 10).read(PROMPT)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(PROMPT)[None]).logits[0, -1]
            base = saved(name).theirs(torch.from_numpy(PROMPT)[None]).logits[0, -1]
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        assert (expected - base).abs().max() > 0.1, "the adapters do nothing"


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass
class Random:
    """A data set of random examples, some of whose targets do not count."""

    num_examples: int = 11
    length: int = 9

    def read(self, indices: Any) -> Any:
        random = np.random.default_rng(0)
        tokens = random.integers(0, 150, (self.num_examples, self.length + 1))
        weights = (random.random((self.num_examples, self.length)) < 0.7).astype(np.float32)
        weights[4] = 0  # nothing of an example
        return tokens[indices, :-1], tokens[indices, 1:], weights[indices]

    def their_loss(self, theirs: Any, count: int) -> float:
        tokens, targets, weights = (torch.from_numpy(x) for x in self.read(np.arange(count)))
        with torch.no_grad():
            logits = theirs.double()(tokens).logits
        theirs.float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return float((losses * weights.flatten()).sum() / weights.sum())


@pytest.mark.parametrize("name", BUILD)
def test_the_loss_is_that_of_transformers(saved, name):
    data, theirs = Random(), saved(name).theirs
    for count, micro_batch in ((11, 2), (11, 100), (5, 1)):
        for resident in (True, False):
            found = evaluate_language(saved(name).ours(resident), data, micro_batch, None, count)  # type: ignore[arg-type]
            assert found.num_examples == count
            assert found.num_tokens == np.count_nonzero(data.read(np.arange(count))[2])
            assert found.loss == pytest.approx(data.their_loss(theirs, count), abs=1e-5)
            assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_chunks_of_examples_change_no_bit(saved, monkeypatch):
    model, data = saved("llama").ours(), Random()
    whole = evaluate_language(model, data, 2, None)  # type: ignore[arg-type]
    loss, sizes = model.loss, []

    def failing(examples: Any, micro_batch: int) -> float:
        sizes.append((len(examples[0]), micro_batch))
        if len(examples[0]) > 3:
            raise MemoryError
        return loss(examples, micro_batch)

    monkeypatch.setattr(model, "loss", failing)
    parts = evaluate_language(model, data, 2, None)  # type: ignore[arg-type]
    assert sizes[0] == (11, 2)
    assert len({n for n, _ in sizes}) > 1
    assert not model._pinned, "it gave up what was resident first"
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (parts.num_tokens, parts.num_examples) == (whole.num_tokens, 11)

    def always(examples: Any, micro_batch: int) -> float:
        raise MemoryError

    monkeypatch.setattr(model, "loss", always)
    with pytest.raises(BudgetBroken, match="9 tokens"):
        evaluate_language(model, data, 2, None)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- text


def test_text_comes_in_whole_characters_and_adds_up(tmp_path):
    for kind in ("gpt2", "metaspace"):
        write_tokenizer(tmp_path / kind, kind)
        text = Text(tmp_path / kind, 500)
        for sentence in (*SENTENCES, "né 🦊🦊 ☃ ok"):
            if kind == "metaspace" and "🦊" in sentence:
                continue
            ids = np.concatenate([part.ids for part in text.encode([sentence])]).tolist()
            for cut in range(1, len(ids)):
                if text.decode(ids[:cut]).endswith("\ufffd"):
                    continue  # no prompt ends within a character
                writer = Writer(text, ids[:cut])
                pieces = [writer.add(token) for token in ids[cut:]]
                assert not any("\ufffd" in piece for piece in pieces)
                assert text.decode(ids[:cut]) + "".join(pieces) + writer.end() == text.decode(ids)
    ids = np.concatenate([part.ids for part in Text(tmp_path / "gpt2", 500).encode(["a🦊"])]).tolist()
    writer = Writer(Text(tmp_path / "gpt2", 500), ids[:1])
    assert [writer.add(token) for token in ids[1:]].count("") == len(ids) - 2
    writer = Writer(Text(tmp_path / "gpt2", 500), ids[:1])
    assert writer.add(ids[1]) == ""
    assert "\ufffd" in writer.end(), "a broken character is written at the end"


def test_special_tokens_are_no_text(tmp_path):
    write_tokenizer(tmp_path)
    text = Text(tmp_path, 500)
    end = text.token_to_id(END)
    assert end is not None
    ids = np.concatenate([part.ids for part in text.encode(["The lazy dog."])]).tolist()
    writer = Writer(text, ids[:2])
    assert "".join([writer.add(token) for token in [end, *ids[2:], end]]) == text.decode(ids[2:])


def test_prompts(tmp_path):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|end|>{% endif %}"
    )
    write_tokenizer(tmp_path / "a", chat_template=template)
    text = Text(tmp_path / "a", 500)

    def plain(words: str) -> list[int]:
        return np.concatenate([part.ids for part in text.encode([words])]).tolist()

    assert generation.read_prompt(text, tmp_path / "a", "The dog", False).tolist() == plain("The dog")
    chat = generation.read_prompt(text, tmp_path / "a", "The dog", True).tolist()
    assert chat == plain("<|start|>user: The dog<|end|>")
    assert chat[0] == text.token_to_id("<|start|>")
    with pytest.raises(UsageError, match="no tokens"):
        generation.read_prompt(text, tmp_path / "a", "", False)
    write_tokenizer(tmp_path / "b")
    with pytest.raises(BadInput, match="no chat template"):
        generation.read_prompt(text, tmp_path / "b", "The dog", True)
    write_tokenizer(tmp_path / "c", chat_template="{{ raise_exception('not me') }}")
    with pytest.raises(BadInput, match="refuses the prompt: not me"):
        generation.read_prompt(text, tmp_path / "c", "The dog", True)


def test_room_for_the_prompt_and_the_text():
    model = LanguageModelSpec(vocab_size=10, max_length=64)
    generation.check_length(model, 60, 4)
    with pytest.raises(UsageError, match=r"60 tokens and 5 more are 65.* at most 64") as error:
        generation.check_length(model, 60, 5)
    assert error.value.hint == "Set --max-tokens 4, or shorten the prompt."
    with pytest.raises(UsageError) as error:
        generation.check_length(model, 64, 1)
    assert error.value.hint == "Shorten the prompt."


def test_end_tokens(tmp_path):
    write_tokenizer(tmp_path)
    text = Text(tmp_path, 500)
    own = text.token_to_id(END)
    assert generation.end_tokens(tmp_path, text) == {own}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert generation.end_tokens(tmp_path, text) == {own, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert generation.end_tokens(tmp_path, text) == {own, 8, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(BadInput, match=r"generation_config.json: eos_token_id"):
        generation.end_tokens(tmp_path, text)


# ----------------------------------------------------------------------------------------------------------- commands

RUN = """
import json, sys
from edgetrain.cli.main import guarded
from importlib import import_module
command = import_module("edgetrain.cli." + sys.argv[1]).command
guarded(lambda: command.main(sys.argv[2:], standalone_mode=False), as_json="--json" in sys.argv)
"""


def run(*arguments: Any, exit_code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = [*map(str, arguments), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *told], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """48 MiB of layers."""
    sizes = {"vocab_size": 420, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 16}
    folder = tmp_path_factory.mktemp("large")
    saved = save(BUILD["llama"](**sizes), folder)
    write_tokenizer(folder)
    return saved


def test_the_budget_holds_and_changes_no_text(large):
    told = ["generate", large.folder, "--prompt", "The quick", "--max-tokens", 12, "--temperature", 2, "--json"]
    free = json.loads(run(*told))
    assert (free["finish"], free["tokens"], free["budget_bytes"]) == ("length", 12, None)
    budget = free["peak_bytes"] - (20 << 20)  # the runtime alone varies by some MiB of file pages
    tight = json.loads(run(*told, "--memory-budget", budget))
    assert tight["text"] == free["text"]
    assert tight["peak_bytes"] <= budget == tight["budget_bytes"]
    refused = json.loads(run(*told, "--memory-budget", "150MiB", exit_code=3))
    assert refused["error"] == "BudgetInfeasible"
    assert "--memory-budget" in refused["hint"]


def test_commands_on_a_session(tmp_path, text_file):
    saved = save(BUILD["llama tied"](vocab_size=420), tmp_path / "model")
    write_tokenizer(saved.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edgetrain.stages, "_CHUNK_BYTES", CHUNK_BYTES)
        session = make_session(tmp_path / "s", saved, text_file)
    value = json.loads(run("evaluate", session.path, "--memory-budget", "500MiB", "--json"))
    dataset = open_text(session.spec.text, HELD_OUT, session.model_files, 420, tmp_path, session.spec.train.seed)
    tokens, targets, weights = (torch.from_numpy(x) for x in dataset.read(np.arange(dataset.num_examples)))
    with torch.no_grad():
        losses = F.cross_entropy(saved.theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected = float((losses * weights.flatten()).sum() / weights.sum())
    assert [row["metric"] for row in value["results"]] == ["loss", "perplexity"]
    assert value["results"][0]["value"] == pytest.approx(expected, abs=1e-5)
    assert value["results"][1]["value"] == pytest.approx(math.exp(expected), rel=1e-4)
    other = tmp_path / "other"
    shutil.copytree(text_file, other)
    splits = {}
    for source, more in ((other, []), (text_file, []), (other, ["--split", "train"])):
        options = ["--data", source, "--memory-budget", "500MiB", "--json", *more]
        found = json.loads(run("evaluate", session.path, *options))
        splits[source, bool(more)] = found["results"][0]["split"], found["num_tokens"]
    assert splits[text_file, False] == (HELD_OUT, value["num_tokens"]), "the session's own text was trained on"
    assert splits[other, False][0] == "all" and splits[other, True][0] == "train"
    assert splits[other, False][1] > splits[other, True][1]
    assert (value["num_examples"], value["num_tokens"]) == (dataset.num_examples, int(weights.sum()))
    assert value["peak_bytes"] <= value["budget_bytes"] == 500 << 20
    written = run("generate", session.path, "--prompt", "The", "--max-tokens", 8, "--memory-budget", "500MiB")
    text = Text(saved.folder, 420)
    prompt = generation.read_prompt(text, saved.folder, "The", False)
    ends = generation.end_tokens(saved.folder, text)
    made = list(generate(Context(saved.ours(), 16).read, prompt, 8, ends, GREEDY))
    writer = Writer(text, prompt.tolist())
    expected_text = "".join(writer.add(token) for token in made if token not in ends) + writer.end()
    assert written == expected_text + "\n"


def test_what_is_no_model_is_refused_before_torch_is_imported(tmp_path, large):
    (tmp_path / "empty").mkdir()
    assert "neither a session" in run("generate", tmp_path / "empty", "--prompt", "a", "--json", exit_code=2)
    long = json.loads(run("generate", large.folder, "--prompt", "The", "--max-tokens", 64, "--json", exit_code=2))
    assert "at most 64" in long["message"]
    code = "import sys, edgetrain.generation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
