"""Small language models trained from the beginning, for the tests of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import devices
from edgetrain.blockwise import build_modules
from edgetrain.models import build_family
from edgetrain.models.codebook import enter, read_out
from edgetrain.objectives.base import Block
from edgetrain.plan import Probe
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import Stage
from edgetrain.store.layout import TensorSpec
from edgetrain.text_sampling import TextModel
from edgetrain.training import create
from edgetrain.vocabulary import put_tokenizer

FAMILIES = ("masked", "ar", "recurrent")
VOCABULARY, LENGTH = 20, 12
ONE_STREAM = {"diffusion_blocks__streams": 1}
TEXT = "In the beginning God created the heaven and the earth.\n" * 40


def small(family: str, **changes: Any) -> Spec:
    base = {
        "model.family": family, "model.width": 32, "model.depth": 4, "model.heads": 2, "model.vocab_size": VOCABULARY,
        "diffusion_blocks.num_blocks": 1 if family == "recurrent" else 2, "data.source": "none", "data.length": LENGTH,
        "train.batch_size": 8, "train.micro_batch": 8, "train.steps": 4, "train.visit_steps": 2, "optimizer.lr": 3e-3,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


class Cycling:
    """Sequences in which the next token is this one plus one, from anywhere."""

    name, split, num_examples, length, vocab_size = "cycling", "train", 200, LENGTH, VOCABULARY

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = (indices[:, None] * 7 + np.arange(LENGTH + 1)) % VOCABULARY
        return tokens[:, :-1], tokens[:, 1:], np.ones((len(indices), LENGTH), np.float32)


def random_block(spec: Spec, block: int = 0, seed: int = 0) -> Block:
    """Modules with random values in every parameter: a zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    made = build_modules(spec, build_family(spec), block)
    for module in made.modules:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            with torch.no_grad():
                parameter.normal_(generator=generator).mul_(0.15)
    return made


def logits_of(spec: Spec, block: Block, tokens: Tensor, z: Tensor, sigma: float) -> Tensor:
    """(n, tokens, vocab_size)."""
    sigmas = torch.full((len(tokens),), sigma)
    boundary = enter(spec, block.stem, block.rows, tokens, z, sigmas)
    for layer in block.layers:
        boundary = layer(boundary)
    return read_out(spec, block.head, block.rows, boundary, z, sigmas)


def new_session(path: Path, spec: Spec, tied: bool = False) -> Session:
    """As ``edgetrain train`` makes it. ``tied``: random weights, of which every block has the same."""
    block = build_modules(spec, build_family(spec), 0)
    kinds = [stage.kind for stage in _stages(spec)]
    shapes = {
        kind: {name: list(p.shape) for name, p in module.named_parameters()}
        for kind, module in zip(kinds, block.modules, strict=True)
    }
    if not tied:
        return create(path, spec, Probe(shapes, None, 0, 0, {}, {}, None))
    per_block = len(spec.layers_of(0))

    def initial(stage: Stage, tensor: TensorSpec) -> list[np.ndarray]:
        number = int(stage.name[-3:]) % per_block if stage.kind == "layer" else 0
        random = np.random.default_rng([number, *stage.kind.encode(), *tensor.name.encode()])
        return [random.standard_normal(tensor.shape).astype(np.float32) * np.float32(0.2)]

    return Session.create(path, spec, shapes, initial, prepare=lambda: put_tokenizer("bytes", path / "model"))


def _stages(spec: Spec) -> list[Stage]:
    from edgetrain.stages import stages_of_block

    return stages_of_block(spec, 0)


def model_of(session: Session, batch: int = 8) -> TextModel:
    return TextModel(session, devices.open_device("cpu"), batch)
