"""The plan of exact training: memory by owner, predicted before any work, and the choices that follow. No torch here.

A probe (``edgetrain.streamed_probe``) measures a step of a model of one layer at a few micro-batches, for each kind of
layer. Whatever else is in memory has a size that is known: buffers, boundaries, logits, what is kept resident.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.limits import LARGEST_FROM_HEAP
from edgetrain.pieces import buffer_bytes, tile_bytes, tiled
from edgetrain.plan import (
    CACHED_BYTES_PER_S,
    MARGIN_OF_ACTIVATIONS,
    Curve,
    Plan,
    StreamedChoice,
    choose,
    session_bytes,
    splits,
)
from edgetrain.spec import LanguageModelSpec, Spec
from edgetrain.stages import ExactStages, Shapes, Unit, exact_stages, rows_of_chunk
from edgetrain.store.layout import StageLayout
from edgetrain.units import MIB, advised_mib

_COMMIT_EVERY_S = 60.0
# The limit keeps 8.5 MiB of it for file pages; predictions are low by up to 2 per cent, and a process grows a little.
_MARGIN_BYTES = 15 * MIB
_GRAPH_BYTES = 24 << 10  # of the Python objects that a kept layer takes for each micro-batch
_SPARE_BYTES = 64 * MIB
_WAITING = ("kept", "boundaries", "logits")  # from forward to backward
_WITHOUT_FAULTS = 0.85  # of the time: what a step takes that maps no memory anew
# Of the activations, as far as these come from the heap: full training and adapters differ by twice as much.
_LEAST_HOLES, _LEAST_HOLES_BYTES = 0.45, 20 * MIB
_OTHER_BOUNDARIES = 4  # gradients, hidden states of the head and theirs, what was looked up


@dataclass(frozen=True)
class LayerProbe:
    """Of one kind of layer: bytes that autograd saves of it, by micro-batch, and seconds of a step by policy."""

    saved_bytes: Curve
    seconds: Mapping[str, Curve]


@dataclass(frozen=True)
class StreamedProbe:
    """What was measured: memory before any buffer; the peak of a step over it, without buffers and boundaries, by
    micro-batch, and what it grows by if freed memory is used again; seconds of stem and head, and by what becomes of
    the logits, of one chunk of an output table.

    ``boundary_bytes``: of one boundary, for each example; ``context_bytes``: of what every layer reads besides.
    ``bf16_speedup``: how many times as fast a product is if it is rounded to bf16, its factors converted each time.
    """

    shapes: Shapes
    budget_bytes: int | None
    own_bytes: int
    runtime_bytes: int
    boundary_bytes: int
    context_bytes: int
    step_bytes: Curve
    hole_bytes: Curve | None
    layers: Mapping[str, LayerProbe]
    fixed_s: Curve
    chunk_s: Mapping[str, Curve]
    bf16_speedup: float = 1.0

    def covers(self, budget_bytes: int) -> bool:
        """Whether nothing was left out that fits into this budget."""
        return self.budget_bytes is None or self.budget_bytes >= budget_bytes

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StreamedProbe:
        def curve(points: Any) -> Curve:
            return Curve([points])

        layers = {
            kind: LayerProbe(
                curve(one["saved_bytes"]), {name: curve(points) for name, points in one["seconds"].items()}
            )
            for kind, one in value["layers"].items()
        }
        chunk_s = {name: curve(points) for name, points in value["chunk_s"].items()}
        holes = value["hole_bytes"]
        return cls(
            value["shapes"], value["budget_bytes"], value["own_bytes"], value["runtime_bytes"],
            value["boundary_bytes"], value["context_bytes"], curve(value["step_bytes"]),
            None if holes is None else curve(holes), layers, curve(value["fixed_s"]), chunk_s,
            float(value["bf16_speedup"]),
        )  # fmt: skip


def make_streamed_plan(
    spec: Spec,
    probe: StreamedProbe,
    budget_bytes: int,
    num_threads: int,
    activations: str | None = None,
    *,
    spec_is_fixed: bool = False,
) -> Plan:
    """The fastest way to train inside the budget.

    Raises:
        BudgetInfeasible: there is none; names the largest owner, the smallest budget, and what lowers it most.
    """
    sizes = _Sizes(spec, probe)
    candidates = list(_candidates(sizes, budget_bytes, activations))
    smallest = smallest_streamed_budget_bytes(spec, probe, activations)
    knob = None if spec_is_fixed else lambda: _knob(spec, probe)
    choice, owners, seconds = choose(candidates, _needed_bytes, budget_bytes, smallest, knob)
    written = sizes.written_bytes(choice, seconds)
    return Plan(
        budget_bytes=budget_bytes,
        peak_bytes=sum(owners.values()),
        smallest_budget_bytes=smallest,
        owners=owners,
        choice=choice,
        step_s=seconds,
        session_bytes=session_bytes(spec, probe.shapes),
        written_bytes_per_step=written,
        scratch_bytes_per_step=sizes.scratch_bytes(choice),
        num_threads=num_threads,
        bf16_speedup=probe.bf16_speedup if spec.exact.compute == "fp32" else 1.0,
    )


def _knob(spec: Spec, probe: StreamedProbe) -> str:
    """What else lowers the smallest budget, most first."""
    if spec.train.micro_batch > 1:
        one = dataclasses.replace(spec, train=dataclasses.replace(spec.train, micro_batch=1))
        return f", or --set train.micro_batch=1, with which {smallest_mib(one, probe)}MiB will do."
    if isinstance(spec.model, LanguageModelSpec):
        return ", or --set data.length to fewer tokens, or LoRA (--recipe lora), which trains less."
    return "."


def smallest_mib(spec: Spec, probe: StreamedProbe) -> int:
    return advised_mib(smallest_streamed_budget_bytes(spec, probe, None))


def smallest_streamed_budget_bytes(spec: Spec, probe: StreamedProbe, activations: str | None) -> int:
    """The least with which training is planned."""
    sizes = _Sizes(spec, probe)
    return max(probe.own_bytes, min(_needed_bytes(owners) for _, owners, _ in _candidates(sizes, 0, activations)))


def _needed_bytes(owners: Mapping[str, int]) -> int:
    # Among what waits the holes are a guess.
    guessed = "holes" in owners and any(owners.get(one) for one in _WAITING)
    spare = _SPARE_BYTES + owners["holes"] // 4 if guessed else 0
    return sum(owners.values()) + _MARGIN_BYTES + round(MARGIN_OF_ACTIVATIONS * owners["activations"]) + spare


def _bytes_at(curve: Curve, micro_batch: int) -> float:
    """Of small tensors the heap may have had room already when it was measured: no less than of larger ones for each
    example."""
    largest, value = curve.points[0][-1]
    return max(curve.at(1, micro_batch), micro_batch * value / largest)


def _seconds_at(curve: Curve, micro_batch: int) -> float:
    """More examples at once never take longer for each, whatever noise the probe's clock had."""
    points = curve.points[0]
    rates = [value / n for n, value in points if n <= micro_batch]
    return micro_batch * min(rates, default=points[0][1] / points[0][0])


_Sort = tuple[tuple[str, bool, str], ...]


def _sort(unit: Unit) -> _Sort:
    return tuple((stage.kind, stage.trained, stage.dtype) for stage in unit.stages)


class _Sizes:
    """Bytes and seconds of a step of a spec, as they follow from a probe."""

    def __init__(self, spec: Spec, probe: StreamedProbe) -> None:
        self.spec, self.probe = spec, probe
        self.stages: ExactStages = exact_stages(spec)
        self._memory: dict[tuple[bool, int, bool], dict[str, int]] = {}
        # Units of one sort have layouts of one size.
        self._known = {_sort(unit): [stage.layout(probe.shapes) for stage in unit.stages] for unit in self.stages.units}
        trained, frozen = ({sort: self._bytes(sort, which) for sort in self._known} for which in (True, False))
        self._trained = {unit: trained[_sort(unit)] for unit in self.stages.units}
        self._frozen = {unit: frozen[_sort(unit)] for unit in self.stages.units}
        self.trained_bytes, self.frozen_bytes = sum(self._trained.values()), sum(self._frozen.values())
        trains = [unit.trained for unit in self.stages.layers]
        below = self.stages.stem.trained or any(unit.trained for unit in self.stages.embedding)
        first_trained = 0 if below else trains.index(True) if True in trains else len(trains)
        self.first_differentiated = max(first_trained, self.stages.backprop_from)
        # Forward and backward; below the first that is differentiated forward alone.
        self._uses = Counter(self.stages.layers)
        self._uses_backward = Counter(self.stages.layers[self.first_differentiated :])
        self._in_tiles = [stage.layout(probe.shapes).in_memory for stage in self.stages.in_tiles]
        # Of the matrices that may come in tiles, trained and frozen.
        self.tiled_bytes = [
            sum(tensor.nbytes for layout in self._in_tiles if layout.trained == trained for tensor in tiled(layout))
            for trained in (True, False)
        ]

    def _layouts(self, units: Iterable[Unit]) -> list[list[StageLayout]]:
        """Those of each sort of unit."""
        return [self._known[sort] for sort in dict.fromkeys(map(_sort, units))]

    def _bytes(self, sort: _Sort, trained: bool) -> int:
        return sum(
            layout.in_memory.section_bytes(layout.roles[0].name)
            for layout in self._known[sort]
            if layout.trained == trained
        )

    def _saved_bytes(self, layers: Iterable[Unit], micro_batch: int) -> float:
        """What autograd saves of them for a micro-batch."""
        kinds = Counter(unit.kind for unit in layers)
        return sum(
            count * (_bytes_at(self.probe.layers[kind].saved_bytes, micro_batch) + _GRAPH_BYTES)
            for kind, count in kinds.items()
        )

    def buffers(self, choice: StreamedChoice) -> dict[str, int]:
        """By owner, what ``StreamedTrainer`` allocates."""
        resident, kept = choice.resident, choice.kept_layers
        key = resident, kept, choice.tiled
        if key not in self._memory:
            layers = self.stages.layers
            pinned = set(self.stages.units if resident else () if choice.tiled else layers[len(layers) - kept :])
            in_tiles = {stage.name for stage in self.stages.in_tiles} if choice.tiled else ()
            tile, trained_tile = tile_bytes(self._in_tiles) if choice.tiled else (0, 0)
            every = buffer_bytes(self._layouts(self.stages.units), False, in_tiles)
            passing = buffer_bytes([] if resident else self._layouts(self.stages.units), False, in_tiles)
            owners = {
                "weights": passing["weights"] + passing["frozen"] + tile,
                "gradients": every["gradients"] + trained_tile,
                "moments": every["moments"],
            }
            trained = sum(self._trained[unit] for unit in pinned)
            frozen = sum(self._frozen[unit] for unit in pinned)
            owners["resident"] = trained * (3 if resident else 1) + frozen
            self._memory[key] = owners
        return dict(self._memory[key])

    def owners(self, choice: StreamedChoice) -> dict[str, int]:
        probe, train = self.probe, self.spec.train
        n, batch = choice.micro_batch, train.batch_size
        owners = {"runtime": probe.runtime_bytes, **self.buffers(choice)}
        owners["activations"] = round(_bytes_at(probe.step_bytes, n))
        # Below the first that trains, a layer is not differentiated: nothing of it is kept.
        kept = self.stages.layers[max(self.first_differentiated, len(self.stages.layers) - choice.kept_layers) :]
        parts = -(-batch // n)
        owners["kept"] = round(self._saved_bytes(kept, n) * parts)
        if choice.boundaries == "memory":
            # What a kept layer saved is a boundary already.
            layers = max(0, len(self.stages.layers) - len(kept) - self.first_differentiated)
            between = probe.boundary_bytes * (layers + _OTHER_BOUNDARIES) + 2 * probe.context_bytes
            owners["boundaries"] = batch * between
            owners["kept"] = max(0, owners["kept"] - len(kept) * batch * probe.boundary_bytes)
        if choice.logits == "keep":
            owners["logits"] = batch * self._logits_bytes
        if choice.keeps_freed and probe.hole_bytes is not None:
            # Those of one layer in which nothing waits were measured; more layers make more, and what waits most.
            from_heap = n * self._chunk_bytes <= LARGEST_FROM_HEAP
            waits = _WAITING if from_heap else [one for one in _WAITING if one != "logits"]
            waiting = sum(owners.get(one, 0) for one in waits)
            # By chance the heap of a probe may have had room: then what it grew by says too little.
            least = min(round(_LEAST_HOLES * owners["activations"]), _LEAST_HOLES_BYTES)
            measured = max(round(_bytes_at(probe.hole_bytes, n)), least)
            # Logits that come back are mapped, and leave the place empty that they were made in.
            chunk = (3 if from_heap else 1) * n * self._chunk_bytes if choice.logits == "offload" else 0
            owners["holes"] = measured + (waiting // 10 or owners["activations"] // 4) + chunk
        if choice.resident and (spilled := self._spilled_bytes):
            owners["spilled"] = spilled
        return owners

    @property
    def _spilled_bytes(self) -> int:
        """Gradients that wait for others: of a tied table for the embedding's, of a layer for its earlier uses', or of
        all for their norm."""
        tied = sum(self._trained[unit] for unit in self.stages.embedding) if self._tied_trained else 0
        tied += sum(self._trained[unit] for unit, uses in self._uses_backward.items() if uses > 1)
        return tied + (self.trained_bytes if self.spec.optimizer.clip_over == "global" else 0)

    @property
    def _tied_trained(self) -> bool:
        chunks = self.stages.embedding
        return bool(chunks) and chunks == self.stages.output and chunks[0].trained

    @property
    def _logits_bytes(self) -> int:
        """Of one example."""
        if not isinstance(self.spec.model, LanguageModelSpec):
            return 0
        return 4 * self.spec.model.vocab_size * self.spec.text.length

    @property
    def _chunk_bytes(self) -> int:
        """The logits of one example and one chunk of the table."""
        if not isinstance(self.spec.model, LanguageModelSpec):
            return 0
        return 4 * rows_of_chunk(self.spec.language.width) * self.spec.text.length

    def seconds(self, choice: StreamedChoice) -> float:
        """Of an optimizer step."""
        probe, n = self.probe, choice.micro_batch
        parts = self.spec.train.batch_size / n
        layers = self.stages.layers
        total = _seconds_at(probe.fixed_s, n)
        first_kept = max(self.first_differentiated, len(layers) - choice.kept_layers)
        # Recomputing and offloading only add work, whatever noise the probe's clock had.
        ways = (
            (layers[first_kept:], {"keep"}),
            (layers[self.first_differentiated : first_kept], {"keep", choice.activations}),
        )
        for units, policies in ways:
            for kind, count in Counter(unit.kind for unit in units).items():
                total += count * max(_seconds_at(probe.layers[kind].seconds[policy], n) for policy in policies)
        for kind, count in Counter(unit.kind for unit in layers[: self.first_differentiated]).items():
            recompute, keep = (_seconds_at(probe.layers[kind].seconds[one], n) for one in ("recompute", "keep"))
            total += count * max(recompute - keep, keep / 4)  # forward alone
        if self.stages.output:
            policies = {"keep", choice.logits}
            total += len(self.stages.output) * max(_seconds_at(probe.chunk_s[policy], n) for policy in policies)
        # Weights are read forward and backward, at each use, and written; moments are read and written.
        moved = 0 if choice.resident else 7 * self.trained_bytes + 2 * self.frozen_bytes
        moved += 0 if choice.resident else sum(
            2 * (uses - 1) * (self._trained[unit] + self._frozen[unit]) for unit, uses in self._uses.items()
        )  # fmt: skip
        if choice.tiled:
            # Read for each micro-batch, forward, again and backward; gradients are added to where they wait, and read
            # for their norm and the update.
            trained, frozen = self.tiled_bytes
            moved += round(5 * parts * trained + (3 * parts - 2) * frozen)
        if self.spec.optimizer.clip_over == "global" and not choice.resident:
            moved += 2 * self.trained_bytes + self.frozen_bytes  # every unit, and its gradient, once more
        if choice.keeps_freed and probe.hole_bytes is not None:
            total *= _WITHOUT_FAULTS
        return total * parts + (moved + self.scratch_bytes(choice)) / CACHED_BYTES_PER_S

    def scratch_bytes(self, choice: StreamedChoice) -> int:
        """Written to the scratch file in a step."""
        probe, n = self.probe, choice.micro_batch
        batch, layers = self.spec.train.batch_size, self.stages.layers
        total = 0
        if choice.boundaries == "moved":
            # The context once, its gradients once a layer.
            total += batch * (2 * probe.boundary_bytes + probe.context_bytes) * (len(layers) + 2)
        if choice.activations == "offload":
            moved = layers[self.first_differentiated : len(layers) - choice.kept_layers]
            total += round(self._saved_bytes(moved, n) * batch / n)
        if choice.logits == "offload":
            total += batch * self._logits_bytes
        if choice.tiled:
            # Where all gradients wait for their norm, these wait already.
            waits = self.spec.optimizer.clip_over == "global"
            total += (-(-batch // n) - waits) * self.tiled_bytes[0]
        if choice.resident:
            return total
        again = sum(max(0, uses - 2) * self._trained[unit] for unit, uses in self._uses_backward.items())
        return total + self._spilled_bytes + again

    def written_bytes(self, choice: StreamedChoice, seconds: float) -> int:
        """Written to the slots in a step: all that trains, with its moments; where it is resident, at commits alone."""
        stored = sum(
            layout.section_bytes("weight") + layout.section_bytes("m") + layout.section_bytes("v")
            for unit in self.stages.units
            for layout in self._known[_sort(unit)]
            if layout.trained
        )
        steps = min(self.spec.train.visit_steps, max(1, round(_COMMIT_EVERY_S / seconds)))
        return stored // steps if choice.resident else stored


def _candidates(
    sizes: _Sizes, budget_bytes: int, forced: str | None
) -> Iterator[tuple[StreamedChoice, dict[str, int], float]]:
    """(choice, bytes by owner, seconds a step), the one that splits and moves least first."""
    train, depth = sizes.spec.train, len(sizes.stages.layers)
    can_tile = any(sizes.tiled_bytes)
    ways = itertools.product(
        [train.micro_batch] if train.micro_batch else splits(train.batch_size),
        (True, False),
        ("memory", "moved"),
        ("keep", "recompute", "offload") if sizes.stages.output else ("recompute",),
        [forced] if forced in ("recompute", "offload") else ["recompute", "offload"],
        (True, False),
        (False, True),
    )
    for micro_batch, resident, boundaries, logits, activations, keeps_freed, in_tiles in ways:
        # What is offloaded leaves the small parts of its graph between the holes.
        if keeps_freed and (activations == "offload" or sizes.probe.hole_bytes is None):
            continue
        if in_tiles and (resident or not can_tile):
            continue
        base = StreamedChoice(micro_batch, activations, 0, resident, boundaries, logits, keeps_freed, in_tiles)
        for kept in _kept(sizes, base, budget_bytes, depth, forced):
            choice = dataclasses.replace(base, kept_layers=kept)
            yield choice, sizes.owners(choice), sizes.seconds(choice)


def _kept(sizes: _Sizes, base: StreamedChoice, budget_bytes: int, depth: int, forced: str | None) -> Sequence[int]:
    """As many layers as fit; none if not even that does."""
    if forced == "keep":
        return [depth]
    if forced is not None:
        return [0]
    low, high = 0, depth
    while low < high:
        middle = (low + high + 1) // 2
        if _needed_bytes(sizes.owners(dataclasses.replace(base, kept_layers=middle))) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return [low]
