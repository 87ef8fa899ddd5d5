"""Small language models as transformers has and saves them, opened to write texts, and sessions of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import devices
import edgetrain.stages
from edgetrain import architectures
from edgetrain.checkpoint import open_checkpoint
from edgetrain.generation import Sampling, generate
from edgetrain.inference import Context, FolderWeights, LanguageModel
from edgetrain.models.language import lora_targets
from edgetrain.session import Session
from edgetrain.spec import ExactSpec, Spec, TextSpec, TrainSpec
from edgetrain.stages import Stage, rows_of_chunk
from edgetrain.store.layout import TensorSpec
from tests.data.text_files import SENTENCES
from tests.models import randomise

transformers = pytest.importorskip("transformers")

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


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Four documents that are held out among ten."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{SENTENCES[number % 5]} {number}", "utf-8")
    return folder
