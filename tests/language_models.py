"""Tiny sessions of exact training, made without a checkpoint, and what a training of one ends with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import devices
import edgetrain.activations
import edgetrain.pieces
import edgetrain.stages
import edgetrain.streamed
from edgetrain.checkpoint import convert
from edgetrain.engine import Engine, Step
from edgetrain.importing import language_shapes
from edgetrain.models import build_network
from edgetrain.models.base import Network
from edgetrain.plan import StreamedChoice
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec, Spec, TextModelSpec
from edgetrain.stages import EXACT_GROUP, Stage, exact_stages
from edgetrain.store import Place
from edgetrain.store.layout import TensorSpec
from edgetrain.streamed import StreamedTrainer
from edgetrain.streamed_probe import shapes_of
from edgetrain.training_data import training_batches

VOCABULARY = 150  # in stages of 64 rows: two whole ones and one of 22
LENGTH = 16

_LLAMA = {
    "family": "llama", "vocab_size": VOCABULARY, "width": 32, "depth": 3, "heads": 4, "kv_heads": 2, "head_dim": 8,
    "mlp_width": 64, "max_length": 64, "tied": True,
}  # fmt: skip
_GPT2 = _LLAMA | {
    "family": "gpt2", "architecture": "GPT2LMHeadModel", "kv_heads": 4, "mlp_width": 128, "max_length": 24,
    "activation": "gelu_new",
}  # fmt: skip
_QWEN3 = _LLAMA | {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "head_dim": 16}
_VIT = {
    "family": "vit", "width": 32, "depth": 3, "heads": 2, "patch": 2, "image_shape": [1, 8, 8], "num_classes": 10,
}  # fmt: skip
_TEXT = {"vocab_size": 50, "width": 32, "depth": 3, "heads": 2, "mlp_ratio": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA, "gpt2": _GPT2, "qwen3": _QWEN3, "vit": _VIT, "dit": _VIT | {"family": "dit"},
    "ar": _TEXT | {"family": "ar"}, "masked": _TEXT | {"family": "masked"},
    "recurrent": _TEXT | {"family": "recurrent", "depth": 2, "loops": 3},
}  # fmt: skip


def cut_small(set_: Callable[[Any, str, Any], None] = setattr) -> None:
    """As if the models were large: tables in small stages, matrices of several tiles, small tensors worth moving."""
    set_(edgetrain.stages, "_CHUNK_BYTES", 1)
    set_(edgetrain.pieces, "_TILE_ELEMENTS", 700)  # 21 rows of 32
    set_(edgetrain.pieces, "_SMALLEST_TILED", 1024)
    set_(edgetrain.pieces, "PIECE_ELEMENTS", 400)  # no multiple of a row, nor a tile one of it
    set_(edgetrain.activations, "SMALLEST_OFFLOADED_BYTES", 512)
    set_(edgetrain.streamed, "SMALLEST_OFFLOADED_BYTES", 512)


def make_spec(model: str = "llama", **changes: Any) -> Spec:
    """A short training of a tiny model; a change is written table__key."""
    data = {} if model in ("vit", "dit") else {"source": "none", "length": LENGTH}
    base = {
        "model": MODELS[model], "data": data, "optimizer": {"lr": 1e-2},
        "train": {"objective": "exact", "steps": 2, "batch_size": 3},
    }  # fmt: skip
    return resolve(base, {name.replace("__", "."): value for name, value in changes.items()})


class Tokens:
    """Sequences of random tokens, each with some positions that count for nothing."""

    num_examples = 60

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        length = spec.text.length
        self.tokens = random.integers(0, spec.model.vocab_size, (self.num_examples, length + 1))
        self.weights = (random.random((self.num_examples, length)) < 0.8).astype(np.float32)

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        tokens = self.tokens[indices]
        return tokens[:, :-1], tokens[:, 1:], self.weights[indices]


class NothingCounts(Tokens):
    """Every second sequence has no position that counts."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.weights[::2] = 0


def images(spec: Spec) -> Any:
    """Random images and labels, as ``training_batches`` gives them."""
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (400, *spec.image_model.image_shape)).astype(np.float32)
    labels = random.integers(0, spec.image_model.num_classes, 400)

    def batches(stage: int, step: int, first: int, count: int) -> tuple[Any, Any]:
        start = (step * spec.train.batch_size + first) % 200
        return pixels[start : start + count], labels[start : start + count]

    return batches


def data_of(spec: Spec) -> Any:
    if isinstance(spec.model, TextModelSpec):
        return training_batches(spec, Tokens(spec))
    return Tokens(spec) if isinstance(spec.model, LanguageModelSpec) else images(spec)


def shapes(spec: Spec) -> dict[str, Any]:
    if isinstance(spec.model, LanguageModelSpec):
        return {k: {n: list(s) for n, s in one.items()} for k, one in language_shapes(spec).items()}
    return dict(shapes_of(spec, build_network(spec, None)))


def initial_values(stage: Stage, tensor: TensorSpec) -> NDArray[np.float32]:
    """Random biases, adapters and norms too: a zero or a one hides mistakes."""
    values = np.random.default_rng([stage.index, *tensor.name.encode()]).standard_normal(tensor.shape) * 0.15
    if len(tensor.shape) == 1 and tensor.name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
        values += 1
    return values.astype(np.float32)


def new_session(path: Path, spec: Spec, external_dtype: str | None = None) -> Session:
    """``external_dtype``: frozen stages lie in a file beside the session, as that type."""
    made = shapes(spec)
    external: dict[str, dict[str, Place]] = {}
    if external_dtype is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        outside = path.parent / "outside.bin"
        with outside.open("wb") as file:
            for stage in exact_stages(spec).stages:
                if not stage.trained:
                    external[stage.name] = {}
                    for tensor in stage.layout(made).tensors:
                        external[stage.name][tensor.name] = Place(outside, file.tell(), external_dtype)
                        values = initial_values(stage, tensor).reshape(-1)
                        file.write(np.ascontiguousarray(convert(values, "F32", external_dtype)).tobytes())

    def initial(stage: Stage, tensor: TensorSpec) -> list[NDArray[Any]]:
        return [convert(initial_values(stage, tensor).reshape(-1), "F32", tensor.dtype)]

    return Session.create(path, spec, made, initial, external=external)


@dataclass
class Done:
    """What a training ends with; two of them are equal if no bit differs."""

    losses: list[float | None]
    norms: list[float]
    hashes: Mapping[str, Mapping[str, str]]
    digest: str
    session: Session = field(compare=False)
    trainer: StreamedTrainer = field(compare=False)


def open_trainer(session: Session, choice: StreamedChoice, device: str = "cpu", data: Any = None) -> StreamedTrainer:
    network: Network = build_network(session.spec, data_of(session.spec) if data is None else data)
    return StreamedTrainer(session, devices.open_device(device, session.scratch), choice, network)


def advance(
    path: Path,
    choice: StreamedChoice,
    device: str = "cpu",
    *,
    steps: int | None = None,
    data: Any = None,
    change: Callable[[StreamedTrainer], None] = lambda trainer: None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Done:
    """Goes on with the session in ``path``, opened anew, for ``steps`` steps or to its end."""
    session = Session.open(path)
    made: list[Step] = []

    def each(step: Step) -> None:
        made.append(step)
        on_step(step)

    with session.store.lock([EXACT_GROUP]):
        trainer = open_trainer(session, choice, device, data)
        change(trainer)
        engine = Engine(session, trainer, choice.micro_batch, session.spec.train.visit_steps)
        engine.warm_up()
        left = session.spec.train.steps - session.progress(0).step
        engine.visit(0, left if steps is None else steps, each)
        session.store.flush()
    again = Session.open(path)
    assert again.store.verify().digest == again.store.digest()
    norms = [-1.0 if math.isnan(step.gradient_norm) else step.gradient_norm for step in made]
    hashes = {name: dict(record.hashes) for name, record in again.store.manifest(EXACT_GROUP).stages.items()}
    return Done([step.loss for step in made], norms, hashes, again.store.digest(), again, trainer)


def tensors(session: Session, role: str) -> Iterator[tuple[Stage, str, NDArray[np.float32]]]:
    """Every tensor of a role of every trained stage, as float32."""
    for stage in exact_stages(session.spec).stages:
        if stage.trained:
            layout = session.layout(stage)
            for tensor in layout.tensors_of(role):
                raw = bytearray(tensor.nbytes)
                session.store.read(stage.name, role, memoryview(raw), layout.offset(role, tensor.name))
                stored = np.frombuffer(raw, {"F32": np.float32, "BF16": np.uint16}[tensor.dtype])
                values = convert(stored, tensor.dtype, "F32")
                yield stage, tensor.name, np.asarray(values).reshape(tensor.shape)
