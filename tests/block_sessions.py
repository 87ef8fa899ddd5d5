"""Small sessions that are trained by blocks, and what a training of one ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import devices
from edgetrain.blockwise import BlockTrainer, build_modules
from edgetrain.data import Dataset, to_float
from edgetrain.engine import Engine
from edgetrain.models import build_family
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Choice, Plan, Probe
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import Stage, group_of_block, groups
from edgetrain.training import create, train

KEEP = Choice(8, "keep", True)
PLENTY_BYTES = 1 << 40


def small(**changes: Any) -> Spec:
    base = {
        "model.width": 16, "model.depth": 4, "model.heads": 2, "model.patch": 2, "model.image_shape": [1, 8, 8],
        "model.num_classes": 10, "diffusion_blocks.num_blocks": 2, "data.shift": 1, "train.batch_size": 8,
        "train.micro_batch": 8, "train.steps": 4, "train.visit_steps": 2, "optimizer.lr": 1e-2,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


def paper(**changes: Any) -> Spec:
    return small(diffusion_blocks__preset="paper", **changes)


def new_session(path: Path, spec: Spec) -> Session:
    """As ``edgetrain train`` makes it, with the shapes taken from modules instead of from a probe."""
    block = build_modules(spec, build_family(spec), 0)
    kinds = {"codebook": block.codebook, "stem": block.stem, "layer": block.layers[0], "head": block.head}
    shapes = {k: {n: list(p.shape) for n, p in m.named_parameters()} for k, m in kinds.items() if m is not None}
    return create(path, spec, Probe(shapes, None, 0, 0, {}, {}, None))


@dataclass
class Done:
    summary: dict[str, Any]
    session: Session
    visited: list[tuple[int, int]]

    @property
    def digest(self) -> str:
        return self.summary["digest"]


def train_on(
    path: Path,
    dataset: Dataset,
    *,
    choice: Choice = KEEP,
    device: str = "cpu",
    blocks: Sequence[int] | None = None,
    visits: int | None = None,
    stop_after: int | None = None,
) -> Done:
    """Goes on with the session in ``path``, opened anew; ``stop_after`` optimizer steps it is interrupted."""
    session = Session.open(path)
    plan = Plan(PLENTY_BYTES, 0, 0, {}, choice, 0.0, 0, 0, 0, 1)
    visited: list[tuple[int, int]] = []
    summary = train(
        session, session.spec, plan, dataset, device, visits=visits,
        blocks=list(range(session.spec.num_blocks)) if blocks is None else blocks,
        on_report=lambda report: visited.append((report.block, report.step)),
        stop=lambda: stop_after is not None and len(visited) >= stop_after,
    )  # fmt: skip
    again = Session.open(path)
    assert again.store.verify().digest == summary["digest"] == again.store.digest()
    return Done(summary, again, visited)


def complete(path: Path, spec: Spec, dataset: Dataset, **how: Any) -> Done:
    new_session(path, spec)
    return train_on(path, dataset, **how)


def tensors(session: Session, stage: Stage, role: str) -> dict[str, np.ndarray]:
    layout = stage.layout(session.shapes)
    data = bytearray(layout.section_bytes(role))
    session.store.read(stage.name, role, memoryview(data))
    return {
        t.name: np.frombuffer(data, np.float32, t.nbytes // 4, layout.offset(role, t.name)).reshape(t.shape).copy()
        for t in layout.tensors
    }


def state(session: Session) -> dict[str, bytes]:
    """Every current section of a session, moments included."""
    return {
        f"{stage.name} {role} {name}": array.tobytes()
        for members in groups(session.spec).values()
        for stage in members
        for role in ("weight", "m", "v")
        for name, array in tensors(session, stage, role).items()
    }


def batches_of(spec: Spec, dataset: Dataset, spoilt: Callable[[int], bool] = lambda step: False) -> Any:
    """Plain batches in the data's order; those of ``spoilt`` steps hold one infinite pixel."""

    def batches(block: int, step: int, first: int, count: int) -> tuple[Any, Any]:
        start = (step * spec.train.batch_size + first) % 1000
        images, labels = dataset.read(np.arange(start, start + count))
        images = to_float(images)
        if spoilt(step):
            images[-1, 0, 3, 3] = np.inf
        return images, labels

    return batches


def run_engine(session: Session, batches: Any, block: int, num_steps: int, choice: Choice = KEEP) -> list[Any]:
    """One visit."""
    steps: list[Any] = []
    with session.store.lock([group_of_block(session.spec, block)]):
        device = devices.open_device("cpu", session.scratch)
        trainer = BlockTrainer(session, device, choice, diffusion_blocks(session.spec, batches))
        engine = Engine(session, trainer, choice.micro_batch)
        engine.warm_up()
        engine.visit(block, num_steps, steps.append)
        session.store.flush()
    return steps


SPECS = {
    "calibrated": small(train__steps=3),
    "paper": paper(train__steps=3),
    "uneven": small(model__depth=5, diffusion_blocks__num_blocks=3, train__steps=2),
    "auxiliary": small(diffusion_blocks__auxiliary=0.5),
    "frozen stem": small(diffusion_blocks__stem="frozen"),
    "shared stem": small(diffusion_blocks__stem="shared"),
    "live codebook": small(diffusion_blocks__codebook="shared"),
}
