"""What ``edgetrain train`` computes with: each plans, prepares the process, makes a session and a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from edgetrain.engine import Trainer
    from edgetrain.plan import Plan
    from edgetrain.session import Session
    from edgetrain.spec import Spec

TrainerOf = Callable[["Session"], "Trainer"]


class Backend(Protocol):
    def plan(self, spec: Spec, found: Session | None, budget: int) -> Plan:
        """Of a session that is to be made, or that was found."""

    def start(self) -> None:
        """Imports what computes; what was noted before may be forgotten when planning begins the process anew."""

    def create(self, path: Path, spec: Spec, class_names: Sequence[str]) -> Session:
        """A new session, as planned."""

    def trainer_of(self, dataset: Any) -> TrainerOf | None:
        """What trains a session; None: torch."""


class Torch:
    def __init__(self, device: str, threads: int, activations: str | None) -> None:
        self._device, self._threads, self._activations = device, threads, activations

    def plan(self, spec: Spec, found: Session | None, budget: int) -> Plan:
        from edgetrain import planning
        from edgetrain.cli.probe import probed

        if found is not None:
            return options.plan_of_session(found, spec, self._device, self._threads, budget, self._activations)
        self._measured = probed(spec, self._device, self._threads, budget, self._activations)
        return planning.make_plan(spec, self._measured, budget, self._threads, self._activations)

    def start(self) -> None:
        options.start_torch(self._threads)

    def create(self, path: Path, spec: Spec, class_names: Sequence[str]) -> Session:
        from edgetrain.training import create

        return create(path, spec, self._measured, class_names)

    def trainer_of(self, dataset: Any) -> TrainerOf | None:
        return None


class OnnxRuntime:
    """onnxruntime-training, in a process without torch."""

    def __init__(self, device: str, threads: int, activations: str | None) -> None:
        from devices.limits import prepare_process

        if device != "cpu" or activations:
            raise UsageError("--backend ort computes on the CPU and keeps activations", "Leave these options out.")
        self._threads = threads
        prepare_process(threads)

    def plan(self, spec: Spec, found: Session | None, budget: int) -> Plan:
        from edgetrain.parameters import block_shapes
        from exporters import ort_training

        ort_training.check(spec)
        self._shapes = block_shapes(spec) if found is None else found.shapes
        self._math = ort_training.BlockMath(spec, self._shapes, self._threads)
        if found is None:
            return self._math.plan(budget, spec.train.micro_batch, exactly=spec.train.micro_batch > 0)
        # A smaller one is taken over where the session's own does not fit.
        return self._math.plan(budget, max(found.progress(block).micro_batch for block in range(spec.num_blocks)))

    def start(self) -> None:
        """Planning has."""

    def create(self, path: Path, spec: Spec, class_names: Sequence[str]) -> Session:
        from edgetrain.plan import Probe
        from edgetrain.training import create

        measured = Probe(self._shapes, None, 0, 0, {}, {}, None)
        return create(path, spec, measured, class_names)

    def trainer_of(self, dataset: Any) -> TrainerOf | None:
        from edgetrain.training_data import training_batches
        from exporters.ort_training import OrtTrainer

        return lambda session: OrtTrainer(session, self._math, training_batches(session.spec, dataset))


def with_micro_batch(spec: Spec, plan: Plan) -> Spec:
    """A new session's: it is kept, since another split of a sum is another rounding."""
    return replace(spec, train=replace(spec.train, micro_batch=plan.choice.micro_batch))
