"""Sessions of exact training: what is read and written, commits, kills, and what goes wrong amid a step."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetrain.engine import Step
from edgetrain.errors import BudgetBroken, TrainingDiverged
from edgetrain.models.base import Boundary
from edgetrain.models.language import LanguageNetwork
from edgetrain.models.vit import ClassifierNetwork
from edgetrain.optim import AdamW
from edgetrain.plan import StreamedChoice
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import exact_stages
from edgetrain.streamed import StreamedTrainer
from tests.language_models import (
    Done,
    NothingCounts,
    Tokens,
    advance,
    cut_small,
    images,
    make_spec,
    new_session,
)

pytestmark = pytest.mark.usefixtures("one_thread", "small_parts")

STREAMED, RESIDENT = StreamedChoice(2), StreamedChoice(2, kept_layers=1, resident=True, logits="keep")
OFFLOADED = StreamedChoice(2, "offload", kept_layers=1, boundaries="moved", logits="offload")
TILED = StreamedChoice(2, kept_layers=1, tiled=True)


SLOW_REWIND = pytest.param(RESIDENT, 50, marks=pytest.mark.slow)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch.setattr)


class Disjoint(Tokens):
    """No token is in two sequences: how they are put together decides nothing about what is looked up."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.num_examples = spec.train.batch_size
        self.tokens[: self.num_examples, :-1] = np.arange(self.num_examples * spec.text.length).reshape(
            self.num_examples, -1
        )


@pytest.mark.parametrize(("choice", "tied"), [(STREAMED, True), (OFFLOADED, False), (RESIDENT, True)])
def test_accumulation_costs_no_weights(choice: StreamedChoice, tied: bool, tmp_path: Path) -> None:
    """A step in 1, 4 or 16 micro-batches reads and writes the same number of bytes."""
    spec = make_spec(data__length=8, train__batch_size=16, train__steps=3, model__tied=tied)
    new_session(tmp_path / "start", spec)
    moved = {}
    for micro_batch in (16, 4, 1):
        path = tmp_path / str(micro_batch)
        shutil.copytree(tmp_path / "start", path)
        totals: list[tuple[int, int]] = []
        trainers: list[Any] = []

        def note(step: Step, totals: list[tuple[int, int]] = totals, trainers: list[Any] = trainers) -> None:
            store = trainers[0].session.store
            totals.append((store.bytes_read, store.bytes_written))

        advance(
            path, StreamedChoice(**{**vars(choice), "micro_batch": micro_batch}), data=Disjoint(spec),
            change=trainers.append, on_step=note,
        )  # fmt: skip
        moved[micro_batch] = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(totals)]
    assert moved[16] == moved[4] == moved[1]
    trained = sum(layout.section_bytes("weight") for layout in Session.open(path).store.trained_layouts)
    read, written = moved[1][0]
    assert written == (0 if choice.resident else 3 * trained - kept_bytes(spec, choice))
    assert read <= 4.5 * trained, "weights forward and backward, two moments, and rows"


def kept_bytes(spec: Spec, choice: StreamedChoice) -> int:
    """Weights that wait for a commit."""
    if not choice.kept_layers:
        return 0
    from tests.language_models import shapes

    kept = exact_stages(spec).layers[-choice.kept_layers :]
    return sum(stage.layout(shapes(spec)).section_bytes("weight") for unit in kept for stage in unit.stages)


def test_sequences_of_which_nothing_counts(tmp_path: Path) -> None:
    spec = make_spec(train__steps=4, train__batch_size=4)
    new_session(tmp_path / "start", spec)
    found = []
    for number, choice in enumerate((StreamedChoice(1), StreamedChoice(1, "offload", 1, False, "moved", "offload"))):
        shutil.copytree(tmp_path / "start", tmp_path / str(number))
        found.append(advance(tmp_path / str(number), choice, data=NothingCounts(spec)))
    assert found[0] == found[1]
    assert found[0].losses[0] is None, "all four of the first step, by chance: no step is made"
    assert None not in found[0].losses[1:]


# ------------------------------------------------------------------------------------------------------- commits


SPEC_OF_SIX: dict[str, Any] = {"train__steps": 6, "optimizer__clip": 0.5}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    new_session(tmp_path / "start", make_spec(**SPEC_OF_SIX))
    return tmp_path / "start"


def copied(start: Path, name: str, visit_steps: int = 50) -> Path:
    path = start.parent / name
    shutil.copytree(start, path)
    session = Session.open(path)
    with session.store.lock(["model"]):
        session.change(make_spec(**SPEC_OF_SIX, train__visit_steps=visit_steps))
    return path


@pytest.mark.parametrize("choice", [RESIDENT, OFFLOADED])
def test_when_it_commits_changes_no_bit(choice: StreamedChoice, start: Path) -> None:
    expected = advance(copied(start, "plain"), STREAMED)
    sequences = set()
    for visit_steps in (1, 4):
        found = advance(copied(start, str(visit_steps), visit_steps), choice)
        assert found == expected
        sequences.add(found.session.store.manifest("model").sequence)
    assert sequences == {1 + 1 + 6, 1 + 1 + 2}, "creation, the micro-batch, and the steps"


def test_stopped_after_each_step_and_gone_on_with_another_choice(start: Path) -> None:
    expected = advance(copied(start, "plain"), STREAMED)
    path = copied(start, "parts")
    losses = []
    for choice, device in [
        (RESIDENT, "cpu"), (STREAMED, "cpu"), (OFFLOADED, "emulated"), (RESIDENT, "emulated"), (OFFLOADED, "cpu"),
        (TILED, "emulated"),
    ]:  # fmt: skip
        found = advance(path, choice, device, steps=1)
        losses += found.losses
    assert losses == expected.losses
    assert found.hashes == expected.hashes
    assert found.session.progress(0) == expected.session.progress(0)


_KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests import language_models as t
t.cut_small()
path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
choices = [
    t.StreamedChoice(2), t.StreamedChoice(2, "offload", 1, False, "moved", "offload"),
    t.StreamedChoice(2, kept_layers=1, resident=True, logits="keep"), t.StreamedChoice(2, tiled=True),
    t.StreamedChoice(2, kept_layers=2),
]
steps = []
for kill in range(kills):
    reading, writing = os.pipe()
    child = os.fork()  # of a process in which torch has not yet done anything
    if child == 0:
        t.advance(path, choices[kill % 5], on_step=lambda step: os.write(writing, b"."))
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(random.uniform(0, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    session = t.Session.open(path)
    assert not [row for row in session.store.verify().rows if row.problems]
    steps.append(session.progress(0).step)
print(json.dumps(steps))
"""


def in_a_process(code: str, *arguments: object) -> Any:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, tmp_path: Path) -> None:
    """It commits every step. What is left is the state after a step, and the end is that of an unbroken training."""
    changes: dict[str, Any] = {"train__steps": 5 * kills, "optimizer__clip": 0.5, "exact__weights": "bf16"}
    spec = make_spec(**changes, train__visit_steps=1)
    new_session(tmp_path / "s", spec)
    new_session(tmp_path / "plain", make_spec(**changes))
    steps = in_a_process(_KILLED, tmp_path / "s", kills, kills)
    assert steps == sorted(steps)
    assert steps[0] < spec.train.steps
    assert steps[-1] > 0, "it came along between the kills"
    found, expected = advance(tmp_path / "s", STREAMED), advance(tmp_path / "plain", STREAMED)
    assert found.hashes == expected.hashes
    assert found.session.progress(0) == expected.session.progress(0)


# ------------------------------------------------------------------------------------------------- what goes wrong


class _Spoil(torch.autograd.Function):
    """The identity, in whose backward pass something happens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, event: Any) -> torch.Tensor:
        ctx.event = event
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.event(gradient), None


OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes."


class SpoiltNetwork(LanguageNetwork):
    """In some steps something happens in a layer.

    Args:
        losses: steps with an infinite loss.
        gradients: {step: the layer in whose backward pass a gradient becomes infinite}.
        memory: (step, layer, "forward" or "backward", how often) where memory runs out.
    """

    def __init__(
        self,
        spec: Spec,
        losses: Collection[int] = (),
        gradients: dict[int, int] | None = None,
        memory: tuple[int, int, str, int] | None = None,
    ) -> None:
        super().__init__(spec, Tokens(spec))  # type: ignore[arg-type]
        self.losses, self.gradients, self.memory = losses, gradients or {}, memory
        self.now = (0, 0)
        self.is_training = False
        self.happened: list[tuple[int, int]] = []
        self.session: Session | None = None

    def prepare(self, module: torch.nn.Module, stage_index: int, step: int, first: int) -> None:
        self.now = (step, stage_index - 2)
        if self.session is not None and self.is_training and first:
            committed = Session.open(self.session.path).progress(0).micro_batch
            assert first % committed == 0, "durable before it takes effect"

    def layer(self, layer: torch.nn.Module, boundary: Boundary, past: Any = None) -> Boundary:
        step, number = now = self.now
        hidden = super().layer(layer, boundary).carried["hidden"]
        if not self.is_training:  # warm-up
            return boundary.advance({"hidden": hidden})
        if step in self.losses:
            hidden = hidden * math.inf
        if self.gradients.get(step) == number and hidden.requires_grad:
            hidden = _Spoil.apply(hidden, lambda gradient: gradient * math.inf)
        if self.memory is not None and self.memory[:2] == now and len(self.happened) < self.memory[3]:
            if self.memory[2] == "forward":
                self._run_out()
            elif hidden.requires_grad:
                hidden = _Spoil.apply(hidden, lambda gradient: self._run_out())
        return boundary.advance({"hidden": hidden})

    def _run_out(self) -> None:
        assert self.memory is not None
        if len(self.happened) < self.memory[3]:
            self.happened.append(self.now)
            raise RuntimeError(OUT_OF_MEMORY)

    def spoil(self, trainer: StreamedTrainer) -> None:
        """Takes the place of the trainer's network, once it is warm."""
        trainer.network = self
        self.session = Session.open(trainer.session.path)  # type: ignore[attr-defined]
        real = trainer.enter

        def enter(block: int) -> None:
            self.is_training = trainer._spoilt_enters > 0  # type: ignore[attr-defined]
            trainer._spoilt_enters += 1  # type: ignore[attr-defined]
            real(block)

        trainer._spoilt_enters = 0  # type: ignore[attr-defined]
        trainer.enter = enter  # type: ignore[method-assign]


def spec_of(path: Path) -> Spec:
    return Session.open(path).spec


def spoilt(path: Path, choice: StreamedChoice, **how: Any) -> tuple[Done, SpoiltNetwork]:
    network = SpoiltNetwork(spec_of(path), **how)
    return advance(path, choice, change=network.spoil), network


@pytest.mark.parametrize("choice", [RESIDENT, OFFLOADED, TILED])
def test_an_infinite_loss_changes_nothing(choice: StreamedChoice, start: Path) -> None:
    found, _ = spoilt(copied(start, "s"), choice, losses=[2])
    assert [loss is None for loss in found.losses] == [False, False, True, False, False, False]
    assert found.session.progress(0).skipped == (2,)
    path = copied(start, "parts")
    advance(path, STREAMED, steps=2)
    before = {f.name: f.read_bytes() for f in (path / "stages").iterdir()}
    network = SpoiltNetwork(spec_of(path), losses=[2])
    advance(path, choice, steps=1, change=network.spoil)
    assert {f.name: f.read_bytes() for f in (path / "stages").iterdir()} == before
    rest = advance(path, STREAMED)
    assert rest.hashes == found.hashes
    assert rest.session.progress(0) == found.session.progress(0)


@pytest.mark.parametrize(
    ("choice", "visit_steps"), [(STREAMED, 1), (RESIDENT, 3), (OFFLOADED, 50), (TILED, 3), SLOW_REWIND]
)
def test_an_infinite_gradient_below_updated_layers_rewinds(
    choice: StreamedChoice, visit_steps: int, start: Path
) -> None:
    expected, _ = spoilt(copied(start, "skips"), STREAMED, losses=[4])
    found, _ = spoilt(copied(start, "s", visit_steps), choice, gradients={4: 0})
    replayed = {1: 0, 3: 1, 50: 4}[visit_steps]
    assert len(found.losses) == 6 + replayed
    assert found.losses[-2:] == expected.losses[-2:]
    assert found.losses[4 + replayed] is None
    assert found.session.progress(0) == expected.session.progress(0)
    assert found.hashes == expected.hashes


def test_a_skipped_step_counts_as_no_update(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias correction of AdamW goes by updates."""
    numbers: list[int] = []
    real = AdamW.update

    def update(self: AdamW, *arguments: Any, number: int, **options: Any) -> None:
        numbers.append(number)
        real(self, *arguments, number=number, **options)

    monkeypatch.setattr(AdamW, "update", update)
    spoilt(start, STREAMED, losses=[0, 3])
    assert list(dict.fromkeys(numbers)) == [1, 2, 3, 4]


def test_an_infinite_gradient_in_the_first_unit_needs_no_rewind(start: Path) -> None:
    """Nothing was updated before it."""
    untied = make_spec(**SPEC_OF_SIX, exact__train="last", exact__last_layers=2)
    new_session(start.parent / "last", untied)
    shutil.copytree(start.parent / "last", start.parent / "skips")
    expected, _ = spoilt(start.parent / "skips", STREAMED, losses=[4])
    network = SpoiltNetwork(untied)
    real = network.head

    def head(module: torch.nn.Module, boundary: Boundary, batch: Any) -> torch.Tensor:
        hidden = real(module, boundary, batch)
        spoils = network.is_training and network.now[0] == 4 and hidden.requires_grad
        return _Spoil.apply(hidden, lambda gradient: gradient * math.inf) if spoils else hidden

    network.head = head  # type: ignore[method-assign, assignment]
    found = advance(start.parent / "last", STREAMED, change=network.spoil)
    assert len(found.losses) == 6, "no step was made again"
    assert found.session.progress(0) == expected.session.progress(0)
    assert found.hashes == expected.hashes


@pytest.mark.parametrize("choice", [STREAMED, RESIDENT, TILED])
def test_with_a_clipped_whole_an_infinite_gradient_changes_nothing(choice: StreamedChoice, tmp_path: Path) -> None:
    spec = make_spec(**SPEC_OF_SIX, optimizer__clip_over="global")
    new_session(tmp_path / "s", spec)
    shutil.copytree(tmp_path / "s", tmp_path / "skips")
    expected, _ = spoilt(tmp_path / "skips", STREAMED, losses=[4])
    network, written, trainers = SpoiltNetwork(spec, gradients={4: 0}), [0], []

    def change(trainer: StreamedTrainer) -> None:
        network.spoil(trainer)
        trainers.append(trainer)

    found = advance(
        tmp_path / "s", choice, change=change,
        on_step=lambda step: written.append(trainers[0].session.store.bytes_written),  # type: ignore[attr-defined]
    )  # fmt: skip
    assert [loss is None for loss in found.losses] == [step == 4 for step in range(6)], "none is made again"
    assert written[5] == written[4]
    assert choice.resident or written[4] > written[3] > written[2]
    assert found.session.progress(0) == expected.session.progress(0)
    assert found.hashes == expected.hashes


@pytest.mark.parametrize("visit_steps", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_ten_infinite_gradients_in_a_row(visit_steps: int, tmp_path: Path) -> None:
    spec = make_spec(train__steps=20, train__visit_steps=visit_steps)
    path = tmp_path / "s"
    new_session(path, spec)
    shutil.copytree(path, tmp_path / "good")
    good, start = advance(tmp_path / "good", STREAMED, steps=2), Session.open(path).store.digest()
    network = SpoiltNetwork(spec, gradients=dict.fromkeys(range(2, 12), 1))
    with pytest.raises(TrainingDiverged, match="up to step 11") as caught:
        advance(path, STREAMED, change=network.spoil)
    assert caught.value.exit_code == 9
    session = Session.open(path)
    assert not [row for row in session.store.verify().rows if row.problems]
    assert session.progress(0).updates == (2 if visit_steps == 1 else 0)
    assert session.store.digest() == (good.digest if visit_steps == 1 else start)


def test_nine_infinite_gradients_in_a_row(tmp_path: Path) -> None:
    spec = make_spec(train__steps=12, train__visit_steps=1)
    new_session(tmp_path / "nine", spec)
    network = SpoiltNetwork(spec, gradients=dict.fromkeys(range(2, 11), 1))
    nine = advance(tmp_path / "nine", STREAMED, change=network.spoil)
    assert nine.session.progress(0).skipped == tuple(range(2, 11))
    assert nine.session.progress(0).step == 12


@pytest.mark.parametrize(("visit_steps", "clip_over"), [(1, "global"), (50, "layer")])
def test_weights_that_explode_are_not_committed(visit_steps: int, clip_over: str, tmp_path: Path) -> None:
    """Their loss is that of guessing, but no gradient is finite any more."""
    spec = make_spec(train__steps=20, train__visit_steps=visit_steps, optimizer__lr=1e4, optimizer__clip_over=clip_over)
    new_session(tmp_path / "s", spec)
    start = Session.open(tmp_path / "s").store.digest()
    with pytest.raises(TrainingDiverged, match="10000"):
        advance(tmp_path / "s", STREAMED)
    session = Session.open(tmp_path / "s")
    assert session.progress(0).step == 0
    assert session.store.digest() == start


def test_a_session_may_begin_with_data_that_has_no_loss(tmp_path: Path) -> None:
    """What warms up runs on it too."""
    spec = make_spec("vit", train__steps=4)
    plain = images(spec)

    def batches(stage: int, step: int, first: int, count: int) -> tuple[Any, Any]:
        pixels, labels = plain(stage, step, first, count)
        return (pixels * math.inf if step == 0 else pixels), labels

    new_session(tmp_path / "s", spec)
    found = advance(
        tmp_path / "s", STREAMED, change=lambda trainer: setattr(trainer, "network", ClassifierNetwork(spec, batches))
    )
    assert [loss is None for loss in found.losses] == [True, False, False, False]


# ---------------------------------------------------------------------------------------------- short of memory


def micro_batch_log(path: Path, log: list[tuple[int, int]], total: int) -> Done:
    """A training that takes its micro-batches as the log says."""
    for (step, size), (end, _) in zip(log, [*log[1:], (total, 0)], strict=True):
        if end > step:
            done = advance(path, StreamedChoice(size), steps=end - step)
    return done


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("choice", [OFFLOADED, TILED, StreamedChoice(2, kept_layers=3, resident=True, logits="keep")])
def test_short_of_memory_once_it_recomputes(choice: StreamedChoice, where: str, start: Path) -> None:
    expected = advance(copied(start, "plain"), STREAMED)
    found, network = spoilt(copied(start, "s", 2), choice, memory=(3, 0, where, 1))
    assert network.happened == [(3, 0)]
    assert (found.trainer.policy, found.trainer.retries) == ("recompute", 1)
    assert found.hashes == expected.hashes
    assert found.session.progress(0) == expected.session.progress(0)


@pytest.mark.parametrize(("where", "visit_steps"), [("forward", 1), ("backward", 3)])
def test_short_of_memory_again_it_splits_the_batch_durably(where: str, visit_steps: int, start: Path) -> None:
    """In backward, upper layers are updated already: it goes back to the last commit."""
    found, network = spoilt(copied(start, "s", visit_steps), RESIDENT, memory=(4, 0, where, 2))
    assert network.happened == [(4, 0)] * 2
    since = 4 if where == "forward" or visit_steps == 1 else 3
    log = [(0, 2), (since, 1)]
    assert list(found.session.progress(0).micro_batches) == log
    expected = micro_batch_log(copied(start, "plain"), log, 6)
    assert found.hashes == expected.hashes
    assert found.session.progress(0) == expected.session.progress(0)


def test_with_nothing_left_to_give_up_it_stops_at_a_commit(start: Path) -> None:
    path = copied(start, "s", 1)
    network = SpoiltNetwork(spec_of(path), memory=(4, 0, "backward", 99))
    with pytest.raises(BudgetBroken, match="step 4 with one example at a time"):
        advance(path, RESIDENT, change=network.spoil)
    session = Session.open(path)
    assert session.progress(0).step == 4
    expected = advance(copied(start, "plain"), STREAMED, steps=4)
    assert session.store.digest() == expected.digest


_SHORT_OF_MEMORY = """
import json, sys
from pathlib import Path
from devices import limits, meter
limits.prepare_process(1)
import torch
torch.set_num_threads(1)
from tests import language_models as t
folder = Path(sys.argv[1])
spec = t.make_spec(train__batch_size=64, data__length=64, model__width=64, model__head_dim=16, model__mlp_width=128,
                   model__depth=6, train__visit_steps=1)
found = []
for name, room_bytes in (("free", None), ("tight", 40 << 20), ("tighter", 12 << 20)):
    t.new_session(folder / name, spec)
    def limit(trainer):
        real = trainer.enter
        def enter(block):
            real(block)
            trainer.enters = getattr(trainer, "enters", 0) + 1
            if trainer.enters == 2 and room_bytes is not None:  # warm
                limits.set_data_limit(meter.usage().data_bytes + room_bytes)
        trainer.enter = enter
    try:
        done = t.advance(folder / name, t.StreamedChoice(64, kept_layers=6, logits="keep"), change=limit)
    finally:
        limits.lift_data_limit()
    found.append({"hashes": done.hashes, "policy": done.trainer.policy, "retries": done.trainer.retries,
                  "log": done.session.progress(0).micro_batches, "losses": done.losses})
    del done
print(json.dumps(found))
"""


def test_a_limit_of_the_system_is_kept_to(tmp_path: Path) -> None:
    free, tight, tighter = in_a_process(_SHORT_OF_MEMORY, tmp_path)
    assert (free["policy"], free["retries"]) == ("keep", 0)
    assert (tight["policy"], tight["retries"], tight["log"]) == ("recompute", 1, [[0, 64]])
    assert tight["hashes"] == free["hashes"]
    assert tighter["policy"] == "recompute"
    sizes = [size for _, size in tighter["log"]]
    assert sizes == [64 >> i for i in range(len(sizes))]
    assert len(sizes) > 1
    assert tighter["losses"] == pytest.approx(free["losses"], rel=1e-4)


_IMPORTS = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests import language_models as t
t.cut_small()
folder = Path(sys.argv[1])
for name, spec, choice in [
    ("a", t.make_spec(), t.StreamedChoice(2, "offload", 1, False, "moved", "offload")),
    ("b", t.make_spec("gpt2", exact__weights="bf16", optimizer__clip_over="global"), t.StreamedChoice(2)),
    ("c", t.make_spec(exact__train="lora", exact__dropout=0.1), t.StreamedChoice(2, "recompute", 2, True)),
    ("d", t.make_spec("vit"), t.StreamedChoice(2, "recompute", 1)),
]:
    t.new_session(folder / name, spec)
    t.advance(folder / name, choice)
heavy = ("sympy", "torch._dynamo", "torch._inductor", "onnx", "transformers", "safetensors")
print(json.dumps(sorted(name for name in sys.modules if name in heavy)))
"""


def test_training_imports_no_compiler_stack(tmp_path: Path) -> None:
    assert in_a_process(_IMPORTS, tmp_path) == []
