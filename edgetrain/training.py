"""A training run from end to end: plan, create or resume, the visits in their order, and the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices import meter
from devices.memory import HostMemory, Memory
from edgetrain.errors import UsageError
from edgetrain.plan import Choice, Plan, Probe
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec, ModelSpec, Spec, StackSpec, TextModelSpec
from edgetrain.stages import Stage, group_of_block
from edgetrain.store.layout import TensorSpec
from edgetrain.streamed_plan import StreamedProbe

if TYPE_CHECKING:
    from devices import Device
    from edgetrain.engine import Trainer

_LOG_EVERY_S = 1.0
_DRAWN_ELEMENTS = 1 << 18
_OWN_STEP_BYTES = 1 << 20
_NEAR_THE_PLAN = 1.01


@dataclass(frozen=True)
class Report:
    """What the display shows after a step; ``rate`` counts ``unit`` a second."""

    block: int
    visit: int
    step: int
    steps: int
    loss: float | None
    rate: float
    unit: str
    done_steps: int
    all_steps: int
    eta_s: float
    bytes_read: int
    bytes_written: int


def next_visit(spec: Spec, steps_done: Sequence[int], blocks: Sequence[int]) -> tuple[int, int] | None:
    """(block, optimizer steps) of the visit that comes next, None when all is trained: from the counters alone.

    A block in the midst of a visit goes on first; then the block with the fewest visits, in the spec's order of sigma.
    """
    length, total = spec.train.visit_steps, spec.train.steps
    if spec.is_exact:  # commits divide it, and need no visit of their own
        return (0, total - steps_done[0]) if steps_done[0] < total else None
    order = sorted(blocks, reverse=spec.train.order == "ascending")  # block 0 owns the highest band
    left = [block for block in order if steps_done[block] < total]
    if not left:
        return None
    block = min(left, key=lambda b: (steps_done[b] % length == 0, steps_done[b] // length))
    return block, min(length - steps_done[block] % length, total - steps_done[block])


def create(
    path: Path,
    spec: Spec,
    probe: Probe | StreamedProbe,
    class_names: Sequence[str] = (),
    dataset: Any = None,
) -> Session:
    """A new session with its initial weights: a pure function of the spec, and of a stack's own initialisation.

    Args:
        dataset: a stack that is no function in a file.
    """
    from edgetrain.parameters import codebook_rows, initial_values
    from edgetrain.randomness import Purpose, Stream, normal_part
    from edgetrain.vocabulary import put_tokenizer

    if isinstance(spec.model, StackSpec):
        from edgetrain.models.stack import StackNetwork

        stack = StackNetwork(spec, dataset)
        return Session.create(path, spec, stack.shapes, stack.initial, class_names)

    def initial(stage: Stage, tensor: TensorSpec) -> Iterator[Any]:
        names = sorted(probe.shapes[stage.kind])
        is_codebook = stage.kind == "codebook"
        purpose = Purpose.CODEBOOK if is_codebook else Purpose.INIT
        stream = Stream(spec.train.seed, purpose, stage.index, names.index(tensor.name))
        # Of a matrix some rows at a time: it may be larger than the budget. The first part has all orthogonal rows.
        size, (height, *inner) = math.prod(tensor.shape), tensor.shape
        width = math.prod(inner)
        rows = max(width, _DRAWN_ELEMENTS // width) if len(inner) == 1 else height
        for first in range(0, height, rows):
            count = min(rows, height - first)
            normals = normal_part(stream, size, first * width, count * width).reshape(count, *inner)
            if is_codebook:
                yield codebook_rows(normals, orthogonal=not first)
            else:
                yield initial_values(spec, tensor.name, normals)

    def prepare() -> None:
        if isinstance(spec.model, TextModelSpec):
            put_tokenizer(spec.model.tokenizer, path / "model")

    return Session.create(path, spec, probe.shapes, initial, class_names, prepare=prepare)


def _trainer(session: Session, device: Device, plan: Plan, dataset: Any) -> Trainer:
    """The trainer of the session's objective, as planned."""
    from edgetrain.training_data import training_batches

    spec = session.spec
    if isinstance(plan.choice, Choice):
        from edgetrain.blockwise import BlockTrainer
        from edgetrain.objectives.diffusion_blocks import diffusion_blocks

        return BlockTrainer(session, device, plan.choice, diffusion_blocks(spec, training_batches(spec, dataset)))
    from edgetrain.models import build_network
    from edgetrain.streamed import StreamedTrainer

    data = training_batches(spec, dataset) if isinstance(spec.model, (ModelSpec, TextModelSpec)) else dataset
    network = build_network(spec, data)
    if isinstance(spec.model, StackSpec):
        from edgetrain.models.stack import StackNetwork, check_shapes

        assert isinstance(network, StackNetwork)
        check_shapes(session.shapes, network, str(session.path))
    return StreamedTrainer(session, device, plan.choice, network)


def _unit(spec: Spec) -> tuple[str, int]:
    """What a rate counts, and how many of it an example has."""
    if isinstance(spec.model, (LanguageModelSpec, TextModelSpec)):
        return "tokens", spec.text.length
    return ("images" if isinstance(spec.model, ModelSpec) else "examples"), 1


def train(  # noqa: PLR0915
    session: Session,
    spec: Spec,
    plan: Plan,
    dataset: Any,
    device_kind: str,
    *,
    visits: int | None,
    blocks: Sequence[int],
    on_report: Callable[[Report], None],
    stop: Callable[[], bool],
    trainer_of: Callable[[Session], Trainer] | None = None,
    host_bytes: int | None = None,
) -> dict[str, Any]:
    """Trains until all is done, ``visits`` visits are made, or ``stop`` says so; returns the summary.

    ``spec`` is the session's, or what it is to become. ``trainer_of``: what trains it; None: torch.
    ``host_bytes``: as of a ``Governor``.

    Raises:
        SessionLocked, DiskError, BudgetBroken, TrainingDiverged: the session stays resumable.
    """
    import devices
    from edgetrain.engine import Engine, Step
    from edgetrain.governor import Governor

    began = time.monotonic()
    store = session.store
    with store.lock({group_of_block(spec, block) for block in blocks}):
        session.change(spec)
        session.write_plan(plan.to_json())
        memory: Memory = HostMemory()
        if trainer_of is None:
            device = devices.open_device(device_kind, session.scratch)
            trainer, memory = _trainer(session, device, plan, dataset), device.memory
        else:
            trainer = trainer_of(session)
        if host_bytes is not None and isinstance(memory, HostMemory):
            raise UsageError(
                "--host-memory is for a device with memory of its own", "Here --memory-budget is about the process."
            )
        engine = Engine(session, trainer, plan.choice.micro_batch, spec.train.visit_steps if spec.is_exact else None)
        engine.warm_up()
        if memory.counts_code:
            memory.limit(plan.budget_bytes)
            engine.run_all_sizes()
            memory.lift()
        governor = Governor(plan.budget_bytes, memory, host_bytes)
        done = {block: session.progress(block) for block in range(spec.num_blocks)}
        start = sum(done[block].step for block in blocks)
        all_steps = spec.train.steps * len(blocks)
        made, last_log = 0, 0.0
        unit, per_example = _unit(spec)

        def on_step(step: Step) -> None:
            nonlocal last_log
            now = time.monotonic()
            done_steps = sum(done[b].step for b in blocks if b != step.block) + step.step + 1
            rate = (done_steps - start) / (now - began)
            rate_now = spec.train.batch_size * per_example / max(step.seconds, 1e-9)
            on_report(
                Report(
                    step.block,
                    made,
                    step.step + 1,
                    spec.train.steps,
                    step.loss,
                    rate_now,
                    unit,
                    done_steps,
                    all_steps,
                    (all_steps - done_steps) / rate,
                    store.bytes_read,
                    store.bytes_written,
                )
            )
            if now - last_log > _LOG_EVERY_S:
                last_log = now
                session.log({
                    "time": time.time(), "block": step.block, "step": step.step, "loss": step.loss, "lr": step.lr,
                    "gradient_norm": step.gradient_norm if step.loss is not None else None,
                    f"{unit}_per_s": rate_now,
                })  # fmt: skip

        def stopping() -> bool:
            return stop() or governor.exceeded

        # By and by a heap gets more holes than were planned for: then it gives them back.
        planned_bytes = _NEAR_THE_PLAN * plan.peak_bytes if plan.choice.keeps_freed else math.inf
        with governor.hold(_OWN_STEP_BYTES, planned_bytes):
            while not stopping() and (visits is None or made < visits):
                steps_done = [done[b].step for b in range(spec.num_blocks)]
                following = next_visit(spec, steps_done, blocks)
                if following is None:
                    break
                block, num_steps = following
                if spec.is_exact and visits is not None:
                    num_steps = min(num_steps, visits * spec.train.visit_steps)
                steps_done[block] += num_steps
                if (after := next_visit(spec, steps_done, blocks)) is not None:
                    trainer.prefetch(after[0])
                done[block] = engine.visit(block, num_steps, on_step, stopping)
                made += visits or 1 if spec.is_exact else 1
            store.flush()
    governor.check()
    complete = all(done[block].step >= spec.train.steps for block in range(spec.num_blocks))
    status = "complete" if complete else "interrupted" if stop() else "partial"
    losses = [done[b].loss for b in blocks]
    return {
        "session": str(session.path),
        "status": status,
        "step": min(progress.step for progress in done.values()),
        "steps": spec.train.steps,
        "loss": None if None in losses else sum(x for x in losses if x is not None) / len(losses),
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": memory.peak_bytes(),
        "host_peak_bytes": meter.usage().peak_bytes,
        "plan_peak_bytes": plan.peak_bytes,
        "bytes_read": store.bytes_read,
        "bytes_written": store.bytes_written,
        "seconds": time.monotonic() - began,
        "retries": trainer.retries,
        "offloaded_bytes": trainer.offloaded_bytes,
        "activations": trainer.policy,
        "micro_batch": done[blocks[0]].micro_batch,
        "digest": store.digest(),
    }
