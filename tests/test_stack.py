"""A stack of somebody's own: trained by streaming as ordinary PyTorch trains it, by command and by program."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
import edgetrain.activations
import edgetrain.api
import edgetrain.streamed
from edgetrain.data.batches import indices_of
from edgetrain.errors import BadInput, BudgetInfeasible, UsageError
from edgetrain.models.stack import StackNetwork, describe, spec_of
from edgetrain.plan import StreamedChoice
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stack import Stack, load_stack, source_hash
from edgetrain.stages import exact_stages
from edgetrain.training import create
from tests.cli.workplace import Workplace
from tests.language_models import advance

pytestmark = pytest.mark.usefixtures("one_thread")

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


# ------------------------------------------------------------------------------------------------ exact


LOOPED = [*range(DEPTH), 1, 1, 0]


@pytest.mark.parametrize(("micro_batch", "order"), [(BATCH, []), (4, []), (4, LOOPED)])
def test_it_trains_as_pytorch_does(tmp_path: Path, micro_batch: int, order: list[int]) -> None:
    """Context, constants, weight decay, blocks that run again and micro-batches that do not divide the batch
    included."""
    made = stack(order=order)
    spec = new_session(tmp_path / "s", made).spec
    model = whole(made)
    model.load_state_dict(weights_of(tmp_path / "s", made))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    advance(tmp_path / "s", StreamedChoice(micro_batch), data=made)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=3e-3, fused=True
    )
    for step in range(STEPS):
        numbers = step * BATCH + np.arange(BATCH)
        pairs = [made.data[i] for i in indices_of(spec.train.seed, 0, numbers, len(made.data)).tolist()]
        x, y = torch.stack([x for x, _ in pairs]).float(), torch.tensor([int(y) for _, y in pairs])
        hidden, context = model["stem"](x)
        for number in order or range(DEPTH):
            hidden = model["blocks"][number](hidden, **context)
        optimizer.zero_grad()
        F.cross_entropy(model["head"](hidden), y).backward()
        optimizer.step()
    found = weights_of(tmp_path / "s", made)
    assert found.keys() == start.keys()
    for name, expected in model.state_dict().items():
        if not name.endswith("scale"):
            assert (expected - start[name]).abs().max() > 1e-3, name
        assert (found[name] - expected).abs().max() < 1e-6, name


CHOICES = [
    StreamedChoice(4, activations, kept, resident, boundaries)
    for activations, kept, resident, boundaries in itertools.product(
        ("recompute", "offload"), (0, 1, DEPTH), (False, True), ("memory", "moved")
    )
]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(("dropout", "order"), [(0.0, []), (0.4, []), (0.4, LOOPED)])
def test_no_choice_changes_a_bit(
    tmp_path: Path, device: str, dropout: float, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, and examples that draw random numbers, each read several times."""
    for module in (edgetrain.activations, edgetrain.streamed):
        monkeypatch.setattr(module, "SMALLEST_OFFLOADED_BYTES", 64)
    made = stack(dropout, noise=0.5, order=order)
    done = []
    for number, choice in enumerate(CHOICES):
        new_session(tmp_path / str(number), made, train__steps=2)
        torch.rand(number)  # what else draws must not matter
        done.append(advance(tmp_path / str(number), choice, device, data=made))
        assert done[-1] == done[0], choice
    assert None not in done[0].losses


def test_dropout_drops_and_goes_on_after_a_stop_as_if_there_was_none(tmp_path: Path) -> None:
    made = stack(0.4)
    digests = []
    for name, parts in (("whole", (4,)), ("stopped", (1, 2, 1))):
        new_session(tmp_path / name, made, train__steps=4)
        for steps in parts:
            torch.manual_seed(steps)
            done = advance(tmp_path / name, StreamedChoice(4), data=made, steps=steps)
        digests.append(done.digest)
    assert digests[0] == digests[1]
    without = stack()
    new_session(tmp_path / "without", without, train__steps=4)
    assert advance(tmp_path / "without", StreamedChoice(4), data=without).digest != digests[0]


def test_masks_differ_by_step_block_and_micro_batch() -> None:
    made = stack(0.5)
    network = StackNetwork(spec_for(made), made)
    module = drop = nn.Dropout(0.5)
    seen = set()
    for position in itertools.product((2, 3), (0, 1), (0, 4)):
        network.prepare(module, *position)
        first = drop(torch.ones(64))
        network.prepare(module, *position)
        assert torch.equal(first, drop(torch.ones(64)))
        seen.add(tuple(first.tolist()))
    assert len(seen) == 8


def test_a_block_that_runs_again_draws_anew() -> None:
    made = stack(0.5, order=LOOPED)
    stages = exact_stages(spec_for(made))
    assert len(stages.layers) == len(LOOPED)
    assert len(stages.units) == DEPTH + 2
    assert len({stages.random_index(position) for position in range(len(LOOPED))}) == len(LOOPED)


@pytest.mark.parametrize("order", [[0], [*range(DEPTH), DEPTH], [-1, *range(DEPTH)]])
def test_an_order_runs_every_block_there_is(order: list[int]) -> None:
    with pytest.raises(BadInput, match="order is"):
        stack(order=order)


@pytest.mark.parametrize("left_out", ["stem", "head", "both"])
def test_stem_and_head_are_optional_and_may_have_no_parameters(tmp_path: Path, left_out: str) -> None:
    bare = {
        "stem": {"stem": nn.Flatten, "data": [(torch.ones(WIDTH, 1) * i, i % 3) for i in range(7)]},
        "head": {"head": nn.ReLU},
        "both": {"stem": None, "head": None, "data": [(np.full(WIDTH, i), i % 3) for i in range(7)]},
    }[left_out]
    if left_out == "both":
        bare["data"] = [(np.full(WIDTH, i, np.float64), i % 3) for i in range(7)]
    made = stack(**bare)
    new_session(tmp_path / "s", made)
    before = weights_of(tmp_path / "s", made)
    done = advance(tmp_path / "s", StreamedChoice(4), data=made)
    after = weights_of(tmp_path / "s", made)
    assert done.losses[0] != done.losses[-1]
    assert {name.split(".")[0] for name in after} == {
        "stem": {"blocks", "head"}, "head": {"stem", "blocks"}, "both": {"blocks"}
    }[left_out]  # fmt: skip
    assert not torch.equal(before["blocks.0.up.weight"], after["blocks.0.up.weight"])


def test_initial_values_are_the_modules_own_and_a_function_of_seed_and_place(tmp_path: Path) -> None:
    made = stack()
    first, again, other = (
        new_session(tmp_path / str(i), made, train__seed=seed) and weights_of(tmp_path / str(i), made)
        for i, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.up.weight"], other["blocks.0.up.weight"])
    assert not torch.equal(first["blocks.0.up.weight"], first["blocks.1.up.weight"])
    assert first["blocks.0.norm.weight"].eq(1).all()
    bound = WIDTH**-0.5
    assert 0.9 * bound < first["blocks.2.up.weight"].abs().max() <= bound
    assert torch.equal(first["blocks.0.scale"], Block().scale)


def test_bf16_weights_are_those_rounded(tmp_path: Path) -> None:
    made = stack()
    new_session(tmp_path / "a", made)
    new_session(tmp_path / "b", made, exact__weights="bf16")
    wide, narrow = weights_of(tmp_path / "a", made), weights_of(tmp_path / "b", made)
    assert torch.equal(narrow["head.weight"], wide["head.weight"].bfloat16().float())


# ------------------------------------------------------------------------------------------------ what is refused


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


# ------------------------------------------------------------------------------------------------ the program


def test_a_program_trains_stops_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgetrain.api, "_warned", False)
    made = stack(0.2)
    changes = {"train.batch_size": BATCH, "train.micro_batch": 3}
    with pytest.warns(UserWarning, match="imported before") as said:
        one = edgetrain.Training(lambda: made, tmp_path / "a", memory_budget="2GiB", steps=4, **changes)
        edgetrain.Training(made, tmp_path / "b", memory_budget="2GiB", steps=4, **changes)
    assert len(said) == 1 and said[0].filename == __file__
    plan = one.plan()
    assert plan.peak_bytes == sum(plan.owners.values()) < 2 << 30
    state = torch.get_rng_state()
    with pytest.raises(UsageError, match="no session yet"):
        one.state_dict()
    assert one.train(steps=1)["status"] == "partial"
    assert torch.equal(state, torch.get_rng_state())
    resumed = edgetrain.Training(made, tmp_path / "a")  # budget and settings are the session's
    summary = resumed.train()
    assert (summary["status"], summary["step"]) == ("complete", 4)
    assert summary["peak_bytes"] <= summary["budget_bytes"]
    whole_run = edgetrain.Training(made, tmp_path / "b", memory_budget="1GiB", steps=4, **changes).train()
    assert whole_run["digest"] == summary["digest"]
    model = whole(made)
    model.load_state_dict(resumed.state_dict())
    with pytest.raises(UsageError, match=re.escape("head.weight is [3, 12] in the stack, and [3, 24] in")):
        narrow = dataclasses.replace(made, head=lambda: nn.Linear(12, CLASSES))
        edgetrain.Training(narrow, tmp_path / "a")
    with pytest.raises(UsageError, match="the stack has 3 blocks, and the session 4"):
        edgetrain.Training(dataclasses.replace(made, blocks=[Block] * 3), tmp_path / "a")
    with pytest.raises(UsageError, match=r"train\.batch_size"):
        edgetrain.Training(made, tmp_path / "a", **{"train.batch_size": 5})
    with pytest.raises(BudgetInfeasible):
        edgetrain.Training(made, tmp_path / "a", memory_budget="50MiB").plan()


def test_a_live_stack_leaves_the_session_its_file(tmp_path: Path) -> None:
    made, source = stack(), f"{tmp_path}/my.py:build"
    create(tmp_path / "s", spec_of(describe(made), source, {}, {}), None, dataset=made)  # type: ignore[arg-type]
    assert edgetrain.Training(made, tmp_path / "s", memory_budget="1GiB").spec.data.source == source


def test_settings_that_are_none(tmp_path: Path) -> None:
    made = stack()
    for changes, message in (
        ({"train.batchsize": 3}, "did you mean 'train.batch_size'"),
        ({"model.depth": 3}, "is no table for a stack"),
        ({"train.objective": "diffusion_blocks"}, "exact objective"),
        ({}, "needs memory_budget"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            edgetrain.Training(made, tmp_path / "s", **changes)


def test_the_front_of_the_package_is_light() -> None:
    code = "import sys, edgetrain; edgetrain.Stack; edgetrain.Training; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="Stacks"):
        edgetrain.Stacks  # noqa: B018


# ------------------------------------------------------------------------------------------------ files and commands


def test_files_that_hold_no_stack(tmp_path: Path) -> None:
    def source(name: str, text: str, function: str = "build") -> str:
        (tmp_path / name).write_text(text)
        return f"{tmp_path / name}:{function}"

    for given, error, message in (
        ("my.py", UsageError, "names no function in a file"),
        ("my.txt:build", UsageError, "names no function in a file"),
        (f"{tmp_path}/none.py:build", UsageError, "there is no file"),
        (source("empty.py", ""), UsageError, "has no function build"),
        (source("broken.py", "x = (\n"), BadInput, "cannot be run: SyntaxError"),
        (source("raising.py", "\n1 / 0\n"), BadInput, "ZeroDivisionError: division by zero (raising.py, line 2)"),
        (source("failing.py", "def build():\n    return [][0]\n"), BadInput, "(failing.py, line 2)"),
        (source("other.py", "def build():\n    return 3\n"), BadInput, "returns a int"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            load_stack(given)
    assert source_hash("none.py:build") == "" != source_hash(source("empty.py", "x = 1"))


FILE = """
import torch, edgetrain
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(width, 4 * width), nn.Dropout(0.1), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.drop(self.up(x).relu()))

class Data:
    def __len__(self):
        return 256

    def __getitem__(self, i):
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(i))
        return x, x.flip(0)

WIDTH, DEPTH = {width}, {depth}

def build():
    return edgetrain.Stack(
        stem=lambda: nn.Linear(WIDTH, WIDTH), blocks=[lambda: Block(WIDTH)] * DEPTH,
        loss=lambda output, target: (output - target).square().mean(), data=Data(),
    )
"""


def write(place: Workplace, name: str, width: int, depth: int) -> Path:
    path = place.folder / name
    path.write_text(FILE.replace("{width}", str(width)).replace("{depth}", str(depth)))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("run"))


def run(place: Workplace, session: str, *arguments: object, **options: Any) -> dict[str, Any]:
    budget = ["--memory-budget", "330MiB", "--set", "train.batch_size=8", "--set", "train.micro_batch=8"]
    return place.json("run", "my.py:build", session, *budget, "--threads", 1, *arguments, **options)


def test_the_command_trains_and_resumes_after_a_kill(place: Workplace) -> None:
    write(place, "my.py", 32, 3)
    every = ["--set", "train.visit_steps=5", "--set", "train.steps=400"]
    expected = run(place, "whole", *every)
    assert (expected["status"], expected["step"]) == ("complete", 400)
    assert expected["peak_bytes"] <= expected["budget_bytes"]
    killed = place.start(
        "run", "my.py:build", "killed", "--memory-budget", "330MiB", "--set", "train.batch_size=8", "--set",
        "train.micro_batch=8", "--threads", 1, *every,
    )  # fmt: skip
    session, step = place.folder / "killed", 0
    for _ in range(1200):
        if Session.exists(session) and (step := Session.open(session).progress(0).step) >= 20:
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert 0 < step < 400, "or nothing was killed"
    assert run(place, "killed", *every)["digest"] == expected["digest"]
    # Other commands find the model by the file's place, from anywhere.
    assert place.json("status", "killed")["step"] == 400
    assert place.json("verify", "killed")["digest"] == expected["digest"]
    assert place.json("plan", "killed", "--threads", 1)["choice"]["micro_batch"] == 8
    assert place.json("train", "killed", "--threads", 1, "--steps", 402)["step"] == 402
    # A program that names the file trains the same session, measured by a process beside it.
    code = """
import json, sys, warnings, torch, edgetrain
warnings.simplefilter("ignore")
training = edgetrain.Training("my.py:build", "whole", memory_budget="400MiB", steps=402, threads=1)
print(json.dumps(training.train()))
assert training.state_dict()["blocks.2.up.weight"].shape == (128, 32)
assert not {"sympy", "torch._dynamo"} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=place.environment,
        cwd=place.folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == place.json("status", "killed")["digest"]


def test_another_model_is_refused(place: Workplace) -> None:
    write(place, "my.py", 32, 3)
    run(place, "refusing", "--steps", 1)
    for name, width, depth, message in (
        ("wider.py", 48, 3, "stem.bias is [48] in the stack, and [32] in"),
        ("deeper.py", 32, 4, "the stack has 4 blocks, and the session 3"),
    ):
        write(place, name, width, depth)
        assert message in place.fails(2, "run", f"{name}:build", "refusing", "--threads", 1)
    (place.folder / "my.py").rename(place.folder / "moved.py")
    assert "there is no file" in place.fails(2, "train", "refusing", "--threads", 1)
    moved = place.json("run", "moved.py:build", "refusing", "--threads", 1, "--steps", 2)
    assert moved["step"] == 2
    assert Session.open(place.folder / "refusing").spec.data.source == f"{place.folder}/moved.py:build"
    assert "too little" in place.fails(3, "run", "moved.py:build", "new", "--memory-budget", "100MiB", "--threads", 1)
    assert not (place.folder / "new").exists()
    write(place, "bad.py", 8, 2)
    text = (place.folder / "bad.py").read_text()
    (place.folder / "bad.py").write_text(text.replace("nn.Linear(4 * width, width)", "nn.Linear(3 * width, width)"))
    said = place.fails(7, "run", "bad.py:build", "bad", "--memory-budget", "330MiB", "--threads", 1)
    assert re.match(r"edgetrain: block \d failed: RuntimeError: .*\(bad.py, line 11\)", said)
    assert not (place.folder / "bad").exists()


def test_a_state_of_twice_the_budget_is_trained_within_it(place: Workplace) -> None:
    write(place, "my.py", 512, 24)
    done = run(place, "large", "--steps", 2)
    session = Session.open(place.folder / "large")
    state_bytes = 3 * sum(layout.section_bytes("weight") for layout in session.store.trained_layouts)
    assert state_bytes > 1.7 * done["budget_bytes"]
    assert done["peak_bytes"] <= done["budget_bytes"] == 330 << 20
    assert abs(done["peak_bytes"] - done["plan_peak_bytes"]) < 12 << 20


# ------------------------------------------------------------------------------------------------ the page


def test_the_example_of_the_page_runs_as_printed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "your-own-model.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    place = Workplace(tmp_path)
    (tmp_path / "my.py").write_text(code)
    printed = re.search(r"^edgetrain (run my\.py:build \S+ --memory-budget \S+ --steps \d+)$", page, re.MULTILINE)
    assert printed is not None
    done = place.json(*printed[1].split(), "--threads", 1)
    assert (done["status"], done["step"]) == ("complete", 200)
    assert done["peak_bytes"] <= done["budget_bytes"]
    assert done["loss"] < 0.4, "it learns"
    assert place.json("doctor", "session", "--threads", 1)["ok"]
