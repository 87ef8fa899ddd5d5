"""Training from a program: ``edgetrain.Training``. Importing this imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import devices
from devices import limits
from edgetrain.errors import BadInput, UsageError
from edgetrain.plan import Plan
from edgetrain.recipe import difference, load_recipe, resolve, to_toml
from edgetrain.session import Session
from edgetrain.spec import Spec, StackSpec
from edgetrain.stack import Stack, load_stack, located
from edgetrain.stages import exact_stages
from edgetrain.units import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from edgetrain.models.stack import StackNetwork
    from edgetrain.streamed_plan import StreamedProbe

_warned = False


class Training:
    """A stack, trained exactly in a session that is created or resumed.

    Started by ``edgetrain run`` a training keeps its budget from the first moment. In a program that has imported torch
    already, the allocator's parameters come late and the plan counts what the program holds as it is now: a warning
    says so. The budget still is a limit on the whole process while ``train`` runs.

    Args:
        model: a stack, a function that returns one, or "FILE.py:FUNCTION": then others can find it too, so the session
            can be trained from the command line.
        session: the folder.
        memory_budget: most resident memory, as "400MiB" or in bytes; None: that of the latest training.
        steps: optimizer steps of the whole session; None: what the session or the recipe says.
        device: "cpu", "cuda", "jetson", "mps", "emulated" or "auto".
        threads: CPU threads; None: as many as torch uses now.
        activations: "keep", "recompute" or "offload" forces what becomes of activations.
        recipe: a TOML file with tables [exact], [optimizer] and [train].
        changes: keys of the spec, as ``**{"train.batch_size": 32}``.

    Raises:
        UsageError: an unknown key; or the session is of another model, or a key may not change in it.
        BadInput: the stack cannot be trained by streaming.
    """

    def __init__(
        self,
        model: Stack | Callable[[], Stack] | str,
        session: str | Path,
        *,
        memory_budget: str | int | None = None,
        steps: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        activations: str | None = None,
        recipe: str | None = None,
        **changes: Any,
    ) -> None:
        _start(threads)
        import torch

        from edgetrain.models.stack import StackNetwork, check_shapes, describe, spec_of

        self.path, self.device, self.activations = Path(session), device, activations
        self.threads = threads or torch.get_num_threads()
        self._probes: dict[Spec, StreamedProbe] = {}
        source = located(model) if isinstance(model, str) else ""
        self._in_file = bool(source)
        self.stack = load_stack(source) if isinstance(model, str) else model if isinstance(model, Stack) else model()
        if not isinstance(self.stack, Stack):
            raise BadInput(
                f"the function returns a {type(self.stack).__name__}", "It must return edgetrain.Stack(...)."
            )
        if steps is not None:
            changes["train.steps"] = steps
        self._session = Session.open(self.path) if Session.exists(self.path) else None
        if self._session is None:
            spec = spec_of(describe(self.stack), source, load_recipe(recipe) if recipe else {}, changes)
            if memory_budget is None:
                raise UsageError("a new session needs memory_budget", 'For example memory_budget="350MiB".')
        else:
            spec = _changed(self._session, source, changes)
        self.spec = spec
        network = StackNetwork(spec, self.stack)
        if self._session is not None:
            check_shapes(self._session.shapes, network, str(self.path))
        if memory_budget is None:
            self.budget_bytes = _saved_budget(self._session)
        else:
            self.budget_bytes = memory_budget if isinstance(memory_budget, int) else parse_bytes(memory_budget)

    def plan(self) -> Plan:
        """What training is going to need, by owner. Measures it first, where that was not done before.

        Raises:
            BudgetInfeasible: it does not fit.
        """
        return self._plan()[0]

    def train(self, steps: int | None = None) -> dict[str, Any]:
        """Trains to the end, or makes ``steps`` steps now; returns the summary that ``edgetrain train --json`` prints.

        Raises:
            BudgetInfeasible, BudgetBroken, DiskError, SessionLocked, TrainingDiverged: a session stays resumable.
        """
        import torch

        from edgetrain import training

        plan, probe = self._plan()
        devices.open_device(self.device).memory.reset_peak()  # what the program did before is no part of this
        made = 0

        def count(_: training.Report) -> None:
            nonlocal made
            made += 1

        with _as_it_was(torch):
            torch.set_num_threads(self.threads)
            if self._session is None:
                train = dataclasses.replace(self.spec.train, micro_batch=plan.choice.micro_batch)
                self.spec = dataclasses.replace(self.spec, train=train)
                self._session = training.create(self.path, self.spec, probe, dataset=self.stack)
            summary = training.train(
                self._session, self.spec, plan, self.stack, self.device, visits=None, blocks=[0], on_report=count,
                stop=lambda: steps is not None and made >= steps,
            )  # fmt: skip
        return summary | {"status": "partial"} if summary["status"] == "interrupted" else summary

    def state_dict(self) -> dict[str, Tensor]:
        """The committed weights, as "stem.NAME", "blocks.3.NAME" and "head.NAME", constant buffers included.

        All of them at once, in memory outside of the budget. They fit the ``state_dict`` of
        ``nn.ModuleDict({"stem": stem(), "blocks": nn.Sequential(*(block() for block in blocks)), "head": head()})``,
        which leaves out a stem or head that there is not.

        Raises:
            UsageError: there is no session yet.
        """
        import torch

        from edgetrain.models.stack import StackNetwork, prefix
        from edgetrain.moves import widened

        session = self._session
        if session is None:
            raise UsageError(f"{self.path} is no session yet", "Train first.")
        network = StackNetwork(session.spec, self.stack)
        found = {f"{prefix(kind)}.{n}": value for kind in network.kinds for n, value in network.constants(kind).items()}
        for stage in exact_stages(session.spec).stages:
            layout, role = session.layout(stage), "weight" if stage.trained else "frozen"
            for tensor in layout.tensors:
                stored = memoryview(bytearray(tensor.nbytes))
                session.store.read(stage.name, role, stored, layout.offset(role, tensor.name))
                values = widened(_bytes(stored), tensor.dtype).reshape(tensor.shape)
                found[f"{prefix(stage.kind)}.{tensor.name}"] = torch.from_numpy(values)
        return found

    def _plan(self) -> tuple[Plan, StreamedProbe]:
        from edgetrain.errors import BudgetInfeasible
        from edgetrain.models.stack import StackNetwork
        from edgetrain.planning import make_plan

        own = self._session.progress(0).micro_batch if self._session is not None else self.spec.train.micro_batch
        kept, free = (
            dataclasses.replace(self.spec, train=dataclasses.replace(self.spec.train, micro_batch=micro_batch))
            for micro_batch in (own, 0 if self._session is not None else own)
        )
        probe = self._probe(free, StackNetwork(free, self.stack))
        try:
            plan = make_plan(kept, probe, self.budget_bytes, self.threads, self.activations)
        except BudgetInfeasible:
            if kept == free:
                raise
            plan = make_plan(free, probe, self.budget_bytes, self.threads, self.activations, spec_is_fixed=True)
        return plan, probe

    def _probe(self, spec: Spec, network: StackNetwork) -> StreamedProbe:
        """Measured by a process of its own if that can find the stack; and with what this process has in memory."""
        import torch

        from edgetrain import streamed_probe
        from edgetrain.cli.probe import probed_beside
        from edgetrain.streamed_plan import StreamedProbe

        if not self._in_file:
            if spec not in self._probes:
                with _as_it_was(torch):
                    torch.set_num_threads(self.threads)
                    measured = streamed_probe.measure(spec, network, network.shapes, self.device, self.budget_bytes)
                self._probes[spec] = StreamedProbe.from_json(measured)
            return self._probes[spec]
        probe = probed_beside(spec, self.device, self.threads, self.budget_bytes, self.activations)
        assert isinstance(probe, StreamedProbe)
        more = max(0, devices.open_device(self.device).memory.resident_bytes() - probe.runtime_bytes)
        return dataclasses.replace(
            probe, runtime_bytes=probe.runtime_bytes + more, own_bytes=probe.own_bytes + more, shapes=network.shapes
        )


def _start(threads: int | None) -> None:
    """Prepares the process for the limit, or says what is too late."""
    global _warned  # noqa: PLW0603
    if "torch" not in sys.modules:
        limits.prepare_process(threads or os.cpu_count() or 1)
        return
    if not _warned:
        _warned = True
        warnings.warn(
            "torch was imported before edgetrain.Training: the allocator's parameters come too late for it, and what "
            "the program holds is counted as it is now, so the plan is less exact and needs more memory. The budget is "
            "enforced while training. For the full guarantee: edgetrain run FILE.py:FUNCTION SESSION.",
            stacklevel=3,
        )
        import torch

        limits.prepare_process(threads or torch.get_num_threads())


@contextlib.contextmanager
def _as_it_was(torch: Any) -> Iterator[None]:
    """The program's random numbers and number of threads, afterwards."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _changed(session: Session, source: str, changes: dict[str, Any]) -> Spec:
    """The session's spec with changes that it survives."""
    import tomllib

    if not isinstance(session.spec.model, StackSpec):
        raise UsageError(f"{session.path} has a model of its own: {session.spec.model.family}", "Use edgetrain train.")
    spec = resolve(tomllib.loads(to_toml(session.spec)), changes | ({"data.source": source} if source else {}))
    spec = session.with_its_micro_batch(spec)
    if difference(session.spec, spec):
        session.check_change(spec)
    return spec


def _saved_budget(session: Session | None) -> int:
    saved = (session.last_plan() or {}).get("budget_bytes") if session is not None else None
    if not isinstance(saved, int):
        raise UsageError("no budget is known for this session yet", 'Name one: memory_budget="350MiB".')
    return saved


def _bytes(stored: memoryview) -> Any:
    import numpy as np

    return np.frombuffer(stored, np.uint8)
