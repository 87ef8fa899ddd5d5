"""Stacks that cannot be trained by streaming, or are none: each is refused, with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.errors import BadInput
from edgetrain.models.stack import StackNetwork
from edgetrain.plan import StreamedChoice
from edgetrain.session import Session
from tests.language_models import advance
from tests.stacks import INPUTS, WIDTH, Block, new_session, spec_for, stack

pytestmark = pytest.mark.usefixtures("one_thread")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.count += 1
        return super().forward(x, condition)


class Replacing(Counting):
    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.count = self.count + 1
        return Block.forward(self, x, condition)


class InPlace(Block):
    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x.mul_(2), condition)


class Wider(Block):
    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.cat([x, x], -1)


class Half(Block):
    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x, condition).half()


def frozen() -> nn.Module:
    block = Block()
    block.up.weight.requires_grad_(False)
    return block


def among(block: Callable[[], nn.Module]) -> dict[str, Any]:
    return {"blocks": [Block, Block, block]}


ONE = Block()

BUILT = {
    "looped": ({"blocks": [lambda: ONE] * 3}, "block 1 is made of the same LayerNorm as block 0"),
    "looped in part": (
        {"blocks": [Block, lambda: nn.Sequential(ONE), lambda: nn.Sequential(ONE, nn.ReLU())]},
        "block 2 is made of the same LayerNorm as block 1",
    ),
    "running statistics": (
        among(lambda: nn.Sequential(Block(), nn.BatchNorm1d(WIDTH))),
        "block 2 has 1, a BatchNorm1d",
    ),
    "double": (among(lambda: Block().double()), "of block 2 is torch.float64"),
    "no parameters": (among(nn.ReLU), "block 2, a ReLU, has no parameters"),
    "shared": (among(Shared), "b.weight of block 2"),
    "frozen": (among(frozen), "up.weight of block 2 has requires_grad=False"),
    "lazy": (among(lambda: nn.LazyLinear(3)), "of block 2 has no shape yet"),
    "no module": (among(lambda: 3), "the factory of block 2 makes a int"),
    "failing factory": (among(lambda: Block("wide")), "block 2 failed: TypeError"),
}
RUN = {
    "buffer changed": (among(Counting), "block 2 changes its buffer count"),
    "buffer replaced": (among(Replacing), "block 2 changes its buffer count"),
    "in place": (among(InPlace), "block 2 changes its input in place"),
    "shape": (among(Wider), "block 2 makes float32 (1, 48) of float32 (1, 24)"),
    "type": (among(Half), "block 2 makes float16 (1, 24) of float32 (1, 24)"),
    "failing": (among(lambda: Block(7)), "block 2 failed: RuntimeError"),
    "loss": ({"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")}, "loss returns float32 (1,), no scalar"),
    "loss is a number": ({"loss": lambda o, t: 0.5}, "loss returns a float"),
    "no pair": ({"data": [torch.zeros(INPUTS)]}, "data[0] is a Tensor, no pair"),
    "text": ({"data": [(torch.zeros(INPUTS), "cat")]}, "the target of data[0] is str"),
    "stem": ({"stem": lambda: nn.Linear(INPUTS, WIDTH).half()}, "of the stem is torch.float16"),
    "integers": ({"stem": None, "data": [(3, 1)]}, "the first hidden state is int64"),
}


@pytest.mark.parametrize("name", BUILT)
def test_what_cannot_be_trained_is_refused_before_it_runs(name: str) -> None:
    changes, message = BUILT[name]
    made = stack(**changes)
    with pytest.raises(BadInput, match=re.escape(message)):
        StackNetwork(spec_for(made), made)


@pytest.mark.parametrize("name", RUN)
def test_what_shows_when_it_runs_is_refused_before_any_step(tmp_path: Path, name: str) -> None:
    changes, message = RUN[name]
    made = stack(**changes)
    with pytest.raises(BadInput, match=re.escape(message)):
        new_session(tmp_path / "s", made, train__batch_size=3)
        advance(tmp_path / "s", StreamedChoice(3), data=made)
    if Session.exists(tmp_path / "s"):
        assert Session.open(tmp_path / "s").progress(0).step == 0


def test_examples_of_a_batch_have_one_shape() -> None:
    made = stack(data=[(torch.zeros(INPUTS - i), i) for i in range(3)])
    network = StackNetwork(spec_for(made), made)
    assert network.draw(0, 0, 1)["input"].shape[0] == 1
    with pytest.raises(BadInput, match=r"the input of data\[\d\] has shape \(\d+,\), and that of data\[\d\] \(\d+,\)"):
        network.draw(0, 0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": []}, "needs blocks"),
        ({"blocks": [nn.Linear(3, 3)]}, "blocks[0] is a module"),
        ({"head": nn.Linear(3, 3)}, "head is a module"),
        ({"stem": 3}, "stem is 3"),
        ({"loss": None}, "loss is None"),
        ({"data": iter([])}, "data is a list_iterator"),
        ({"data": []}, "no examples"),
    ],
)
def test_a_stack_that_is_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        stack(**changes)
