"""A small stack of somebody's own, and sessions of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
import edgetrain.api
from edgetrain.models.stack import describe, spec_of
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stack import Stack
from edgetrain.training import create

WIDTH, INPUTS, CLASSES, DEPTH = 24, 10, 3, 4
STEPS, BATCH = 5, 6


class Block(nn.Module):
    """Reads its context, has a constant, and may drop."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.shift = torch.full((width,), 0.1)  # a constant that is no buffer

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm(x) * self.scale + self.shift
        if condition is not None:
            h = h * (1 + condition)
        return x + self.down(self.drop(F.gelu(self.up(h))))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.condition = nn.Linear(INPUTS, WIDTH), nn.Linear(INPUTS, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.enter(x), {"condition": self.condition(x)}


class Data:
    """Pairs of an array and a number; ``noise`` is drawn anew each time an example is read."""

    def __init__(self, noise: float = 0.0) -> None:
        generator = np.random.default_rng(0)
        self.x, self.y = generator.standard_normal((50, INPUTS)), generator.integers(0, CLASSES, 50)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        drawn = torch.randn(INPUTS).numpy() + np.random.standard_normal(INPUTS) + random.random()  # noqa: NPY002
        x = torch.from_numpy(self.x[i] + self.noise * drawn)
        return x, self.y[i]


def stack(dropout: float = 0.0, noise: float = 0.0, **changes: Any) -> Stack:
    given: dict[str, Any] = {
        "stem": Stem, "blocks": [lambda: Block(dropout=dropout)] * DEPTH, "head": lambda: nn.Linear(WIDTH, CLASSES),
        "loss": F.cross_entropy, "data": Data(noise),
    }  # fmt: skip
    return Stack(**given | changes)


def spec_for(made: Stack, **changes: Any) -> Spec:
    settings = {
        "train.steps": STEPS, "train.batch_size": BATCH, "optimizer.lr": 3e-3, "optimizer.clip": 1e9,
        "optimizer.schedule": "constant", "optimizer.warmup": 0.0, "optimizer.weight_decay": 0.1,
    }  # fmt: skip
    return spec_of(describe(made), "", {}, settings | {k.replace("__", "."): v for k, v in changes.items()})


def new_session(path: Path, made: Stack, **changes: Any) -> Session:
    return create(path, spec_for(made, **changes), None, dataset=made)  # type: ignore[arg-type]


def whole(made: Stack) -> nn.ModuleDict:
    parts = {"stem": made.stem, "blocks": lambda: nn.Sequential(*(block() for block in made.blocks)), "head": made.head}
    return nn.ModuleDict({name: part() for name, part in parts.items() if part is not None})


def weights_of(path: Path, made: Stack) -> dict[str, Tensor]:
    return edgetrain.Training(made, path, memory_budget="1GiB").state_dict()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgetrain.api, "_warned", True)
