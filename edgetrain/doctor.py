"""Whether streaming computes a session's gradients as PyTorch does when everything is in memory.

The reference is ordinary: modules with weights of their own, one graph over the last layers and the head, one call of
``backward``. A language model's loss is taken from float64 logits: the float32 of a large vocabulary is less exact than
what is to be checked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import devices
from edgetrain.models import build_network
from edgetrain.models.base import Boundary, Network
from edgetrain.models.mixed_precision import in_precision
from edgetrain.moves import widened
from edgetrain.plan import StreamedChoice
from edgetrain.resident import Resident
from edgetrain.session import Session
from edgetrain.spec import ModelSpec, Spec, StackSpec, TextModelSpec
from edgetrain.stages import ExactStages, Stage, Unit, exact_stages, rows_of_chunk
from edgetrain.store.layout import StageLayout
from edgetrain.streamed import StreamedTrainer
from edgetrain.training_data import training_batches

TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
"""By what is computed in: of products in bf16, which has 8 bits, a loss in float64 differs by as much."""
_COMPILERS = ("torch._dynamo", "torch._inductor", "sympy")

Gradients = dict[tuple[str, str], Tensor]
"""By stage and tensor, on the host."""


@dataclass(frozen=True)
class Row:
    """One gradient, streamed and resident. ``relative`` is the largest difference over the largest value."""

    stage: str
    tensor: str
    bit_equal: bool
    absolute: float
    relative: float
    finite: bool


@dataclass(frozen=True)
class Diagnosis:
    """What was found on the first ``micro_batch`` examples of the next step.

    ``repeats``: the streamed gradients came out bit for bit alike twice. ``compilers``: what was imported of the
    compiler stack, which takes some 70 MiB.
    """

    rows: Sequence[Row]
    layers: int
    micro_batch: int
    streamed_loss: float
    resident_loss: float
    repeats: bool
    compilers: Sequence[str]
    peak_bytes: int
    tolerance: float

    @property
    def relative(self) -> float:
        """Of the worst tensor."""
        return max((row.relative for row in self.rows), default=math.inf)

    @property
    def good(self) -> bool:
        """Whether gradients are finite, come out twice, and are within the tolerance of the reference."""
        losses_agree = abs(self.streamed_loss - self.resident_loss) <= self.tolerance * max(
            1.0, abs(self.resident_loss)
        )
        finite = bool(self.rows) and all(row.finite for row in self.rows)
        return self.repeats and finite and losses_agree and self.relative <= self.tolerance


def examine(session: Session, dataset: Any, device_kind: str, scratch: Path, num_layers: int = 2) -> Diagnosis:
    """Compares the gradients of the last ``num_layers`` layers and the head; if those are all, of the stem too.

    Token tables are read, and their gradients not compared.

    Args:
        dataset: what the session's model trains on, as ``training.train`` takes it.
        scratch: a folder on disk for what moves out.
    """
    device = devices.open_device(device_kind, scratch)
    spec = session.spec
    batches = training_batches(spec, dataset) if isinstance(spec.model, (ModelSpec, TextModelSpec)) else dataset
    network = build_network(spec, batches)
    if isinstance(spec.model, StackSpec):
        from edgetrain.models.stack import StackNetwork, check_shapes

        assert isinstance(network, StackNetwork)
        check_shapes(session.shapes, network, str(session.path))
    progress = session.progress(0)
    micro_batch = progress.micro_batch or spec.train.micro_batch or 1
    stages = exact_stages(spec)
    # A layer that runs again has gradients of every run.
    num_layers = len(stages.layers) if stages.is_looped else min(num_layers, len(stages.layers))
    stages = _compared(stages, num_layers)
    source = _Weights(session, stages)
    choice = StreamedChoice(micro_batch, boundaries="moved")
    trainer = StreamedTrainer(source, device, choice, network, stages)
    first, second = ({}, {})  # type: Gradients, Gradients
    for into in (first, second):
        trainer.enter(0)
        loss = trainer.differentiate(progress.step, micro_batch, _collector(into))
    del trainer
    reference = _Reference(source, in_precision(network, spec, device), stages, device.torch_device)
    resident_loss, expected = reference.gradients(progress.step, micro_batch, len(stages.layers) - num_layers)
    return Diagnosis(
        rows=[_row(key, first[key], expected[key]) for key in expected],
        layers=num_layers,
        micro_batch=micro_batch,
        streamed_loss=loss,
        resident_loss=resident_loss,
        repeats=first.keys() == second.keys() and all(_same_bits(first[key], second[key]) for key in first),
        compilers=[name for name in _COMPILERS if name in sys.modules],
        peak_bytes=device.memory.peak_bytes(),
        tolerance=TOLERANCE[spec.exact.compute],
    )


def _row(key: tuple[str, str], streamed: Tensor, resident: Tensor) -> Row:
    difference = (streamed.double() - resident.double()).abs().max().item()
    largest = resident.double().abs().max().item()
    relative = difference / largest if largest else math.inf if difference else 0.0
    finite = bool(torch.isfinite(streamed).all()) and bool(torch.isfinite(resident).all())
    return Row(*key, _same_bits(streamed, resident), difference, relative, finite)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def _compared(stages: ExactStages, num_layers: int) -> ExactStages:
    """The same stages, of which only those train whose gradients are compared."""

    def still(unit: Unit) -> Unit:
        return replace(unit, stages=tuple(replace(stage, sharing="frozen") for stage in unit.stages))

    first = len(stages.layers) - num_layers
    embedding = tuple(map(still, stages.embedding))
    tied = stages.output == stages.embedding
    return replace(
        stages,
        stem=still(stages.stem) if first else stages.stem,
        layers=(*map(still, stages.layers[:first]), *stages.layers[first:]),
        embedding=embedding,
        output=embedding if tied else tuple(map(still, stages.output)),
    )


def _collector(into: Gradients) -> Any:
    def seen(unit: Unit, resident: Resident) -> None:
        for member in resident.members:
            if member.stage.trained:
                for tensor in member.layout.tensors:
                    owner, _, name = tensor.name.rpartition(".")
                    gradient = getattr(member.module.get_submodule(owner), name).grad
                    into[member.stage.name, tensor.name] = gradient.to("cpu", copy=True)

    return seen


class _Weights:
    """A session's weights under the roles that the stages in question have."""

    def __init__(self, session: Session, stages: ExactStages) -> None:
        self.spec: Spec = session.spec
        self.session = session
        self._stored = {stage.name: stage for stage in exact_stages(session.spec).stages}
        self.store = self

    def layout(self, stage: Stage) -> StageLayout:
        return replace(self.session.layout(self._stored[stage.name]), trained=stage.trained)

    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        if role in ("frozen", "weight"):
            role = "weight" if self._stored[stage].trained else "frozen"
        self.session.store.read(stage, role, into, offset)

    def prefetch(self, stages: Iterable[str]) -> None:
        pass


class _Reference:
    """The model in memory as far as it is differentiated, and a part at a time below."""

    def __init__(self, weights: _Weights, network: Network, stages: ExactStages, device: torch.device) -> None:
        self.weights, self.network, self.stages, self.device = weights, network, stages, device

    def gradients(self, step: int, count: int, first_layer: int) -> tuple[float, Gradients]:
        """The loss of the step's first ``count`` examples, and its gradients from ``first_layer`` on."""
        batch = {
            name: torch.from_numpy(array).to(self.device) for name, array in self.network.draw(step, 0, count).items()
        }
        if self.stages.embedding:
            batch["embedded"] = self._embedded(batch["tokens"])
        held: dict[Unit, nn.Module] = {}
        boundary = self._entered(batch, held, first_layer)
        for position, unit in enumerate(self.stages.layers):
            module = held[unit] if unit in held else self._module(unit)
            self.network.prepare(module, self.stages.random_index(position), step, 0)
            if position and position == self.stages.backprop_from:
                boundary = boundary.advance({name: tensor.detach() for name, tensor in boundary.carried.items()})
            with torch.set_grad_enabled(position >= first_layer):
                boundary = boundary.advance(self.network.layer(module, boundary).carried)
            if position >= first_layer:
                held[unit] = module
        head = held[self.stages.head] = self._module(self.stages.head)
        result = self.network.head(head, boundary, batch)
        loss = self._from_table(result, batch) if self.stages.output else result
        value = loss.item()
        loss.backward()
        if self.stages.output:
            value = self._table_loss
        return value, {
            (stage.name, tensor.name): _gradient(module, tensor.name)
            for unit, module in held.items()
            for stage in unit.stages
            if stage.trained
            for tensor in self.weights.layout(stage).tensors
        }

    def _entered(self, batch: Mapping[str, Tensor], held: dict[Unit, nn.Module], first_layer: int) -> Boundary:
        stem = self._module(self.stages.stem)
        if not first_layer:
            held[self.stages.stem] = stem
        with torch.set_grad_enabled(not first_layer):
            return self.network.enter(stem, batch)

    def _module(self, unit: Unit) -> nn.Module:
        """A unit with weights of its own."""
        with torch.device("meta"):
            module = self.network.build(unit.kind)
        for stage in unit.stages:
            for name, values in self._tensors(stage):
                owner, _, attribute = name.rpartition(".")
                parameter = nn.Parameter(values.to(self.device), requires_grad=stage.trained)
                setattr(module.get_submodule(owner), attribute, parameter)
        return module

    def _tensors(self, stage: Stage) -> Iterable[tuple[str, Tensor]]:
        layout = self.weights.layout(stage)
        role = layout.roles[0].name
        for tensor in layout.tensors:
            stored = np.empty(tensor.nbytes, np.uint8)
            self.weights.read(stage.name, role, stored.data, layout.offset(role, tensor.name))
            yield tensor.name, torch.from_numpy(widened(stored, tensor.dtype)).reshape(tensor.shape)

    def _rows(self, units: Sequence[Unit]) -> Iterable[tuple[int, Tensor]]:
        """(first token, rows (rows, width)) of each chunk of a table."""
        size = rows_of_chunk(self.weights.spec.language.width)
        for number, unit in enumerate(units):
            yield number * size, dict(self._tensors(unit.stages[0]))["weight"].to(self.device)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """(n, length) -> (n, length, width)."""
        out = torch.empty(*tokens.shape, self.weights.spec.language.width, device=self.device)
        for first, rows in self._rows(self.stages.embedding):
            inside = (tokens >= first) & (tokens < first + len(rows))
            out[inside] = rows[tokens[inside] - first]
        return out

    def _from_table(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """A scalar with the gradient of the weighted cross-entropy by ``hidden`` (n, width), taken in float64."""
        targets, weights = batch["targets"], batch["weights"].double()
        counts = weights > 0
        x, targets, weights = hidden.detach()[counts].double(), targets[counts], weights[counts]
        log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=self.device)
        right = torch.zeros_like(log_sum)
        for first, rows in self._rows(self.stages.output):
            logits = x @ rows.double().T
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(logits, 1))
            mine = (targets >= first) & (targets < first + len(rows))
            right[mine] = logits[mine].gather(1, (targets[mine] - first)[:, None])[:, 0]
        self._table_loss = (weights * (log_sum - right)).sum().item()
        gradient = torch.zeros_like(x)
        for first, rows in self._rows(self.stages.output):
            wide = rows.double()
            share = torch.exp(x @ wide.T - log_sum[:, None])
            mine = ((targets >= first) & (targets < first + len(rows))).nonzero()[:, 0]
            share[mine, targets[mine] - first] -= 1
            gradient += (share * weights[:, None]) @ wide
        return (hidden[counts].double() * gradient).sum()


def _gradient(module: nn.Module, name: str) -> Tensor:
    parameter = module.get_parameter(name)
    return torch.zeros_like(parameter, device="cpu") if parameter.grad is None else parameter.grad.cpu()
