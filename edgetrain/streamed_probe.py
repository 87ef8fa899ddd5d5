"""Measures what a step of exact training needs, in a process that does nothing else.

The trainer itself runs, on models of one layer and one chunk of a table whose weights are never written: they are the
kernel's one page of zeros. Beyond what is always measured it works under the budget's limit.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import devices
from devices import Device, limits
from edgetrain.models.base import Network
from edgetrain.optim import warm_up_kernels
from edgetrain.plan import StreamedChoice
from edgetrain.spec import Spec
from edgetrain.stages import ExactStages, Shapes, Stage, Unit, exact_stages
from edgetrain.store.layout import StageLayout
from edgetrain.streamed import StreamedTrainer

_ALWAYS_MEASURED = 2  # micro-batches: the least that a line can be drawn through
_MICRO_BATCHES = (1, 2, 4, 8)
_SMALLEST_TENSOR_BYTES = 128 << 10
_TILED_FROM_ELEMENTS = 1 << 23  # of a layer: weights and gradients of 64 MiB
_ENOUGH_S = 4.0  # no larger micro-batch where a step of one layer takes this long
_REPEATS = 3
_ROUNDS = 4
_LOGITS = ("recompute", "keep", "offload")

Points = list[tuple[int, float]]


def shapes_of(spec: Spec, network: Network) -> Shapes:
    """The shapes of a network's parameters, by kind of stage."""
    with torch.device("meta"):
        kinds = {unit.kind: network.build(unit.kind) for unit in exact_stages(spec).units}
    return {k: {n: list(p.shape) for n, p in module.named_parameters()} for k, module in kinds.items()}


class _Zeros:
    """A store whose bytes are all zero, as the memory that they would be read into."""

    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        pass

    def prefetch(self, stages: Iterable[str]) -> None:
        pass


class _Model:
    """What a trainer wants of a session."""

    def __init__(self, spec: Spec, shapes: Shapes) -> None:
        self.spec, self._shapes = spec, shapes
        self.store = _Zeros()

    def layout(self, stage: Stage) -> StageLayout:
        return stage.layout(self._shapes).in_memory


def measure(spec: Spec, network: Network, shapes: Shapes, device_kind: str, budget_bytes: int) -> dict[str, Any]:
    """The fields of a ``streamed_plan.StreamedProbe``. ``limits.prepare_process`` comes first."""
    with tempfile.TemporaryDirectory(prefix="edgetrain.", dir=_folder()) as scratch:
        return _Measurement(spec, network, shapes, devices.open_device(device_kind, Path(scratch)), budget_bytes).run()


def _folder() -> str | None:
    """On disk, for /tmp may be memory."""
    return "/var/tmp" if Path("/var/tmp").is_dir() else None


class _Measurement:
    def __init__(self, spec: Spec, network: Network, shapes: Shapes, device: Device, budget_bytes: int) -> None:
        self.model, self.network, self.shapes, self.device = _Model(spec, shapes), network, shapes, device
        self.memory = device.memory
        self.stages = exact_stages(spec)
        self.budget_bytes = budget_bytes
        self.most = spec.train.micro_batch or spec.train.batch_size
        # Of large layers the probe must not need what a training in tiles does not.
        layouts = [self.model.layout(stage) for stage in self.stages.in_tiles[:1]]
        self.tiled = sum(layout.num_elements for layout in layouts) >= _TILED_FROM_ELEMENTS
        self.own_bytes = 0
        self.bounded = False

    def run(self) -> dict[str, Any]:
        # The last of each: if any trains, it does.
        kinds = {self.network.measured_as(unit.kind): unit for unit in self.stages.layers}
        warm_up_kernels(self.device)
        micro_batches = [n for n in _MICRO_BATCHES if n <= self.most]
        step_bytes: Points = []
        fixed_s: Points = []
        chunk_s: dict[str, Points] = {logits: [] for logits in _LOGITS}
        layers: dict[str, dict[str, Any]] = {
            kind: {"saved_bytes": [], "seconds": {"recompute": [], "keep": [], "offload": []}} for kind in kinds
        }
        boundary_bytes = context_bytes = 0
        for number, n in enumerate(micro_batches):
            try:
                self._limit(number >= _ALWAYS_MEASURED)
                fixed, chunks = self._outside_of_layers(n)
                peak = 0
                for kind, unit in kinds.items():
                    found, saved, seconds, (boundary_bytes, context_bytes) = self._layer(unit, n)
                    peak = max(peak, found)
                    layers[kind]["saved_bytes"].append((n, saved))
                    for policy, value in seconds.items():
                        layers[kind]["seconds"][policy].append((n, max(0.0, value - fixed - chunks["recompute"])))
                step_bytes.append((n, peak))
                fixed_s.append((n, fixed))
                for logits in _LOGITS:
                    chunk_s[logits].append((n, chunks[logits]))
                slowest = max(seconds.values())
                if number == 0:
                    # Of tensors below 64 KiB, which come from the heap, memory is not linear.
                    small = -(-_SMALLEST_TENSOR_BYTES // max(1, boundary_bytes))
                    more = {n for n in (small, 2 * small, min(self.most, 4 * small)) if n <= self.most}
                    micro_batches[:] = sorted({*micro_batches, *more})
            except (RuntimeError, MemoryError) as error:
                if not limits.is_out_of_memory(error):
                    raise
                self.bounded = True
            finally:
                self.memory.lift()
            if self.bounded or slowest > _ENOUGH_S:
                break
        gc.collect()
        limits.return_freed_memory()
        runtime_bytes = self.memory.resident_bytes() + self.memory.late_bytes
        # Last: a heap that once was large stays so in part.
        holes = self._holes(kinds, step_bytes)
        measured = len(step_bytes)
        for one in layers.values():  # what was measured of a micro-batch that then did not fit
            one["saved_bytes"] = one["saved_bytes"][:measured]
            one["seconds"] = {policy: points[:measured] for policy, points in one["seconds"].items()}
        return {
            "shapes": self.shapes, "budget_bytes": self.budget_bytes if self.bounded else None,
            "own_bytes": self.own_bytes, "runtime_bytes": runtime_bytes,
            "boundary_bytes": boundary_bytes, "context_bytes": context_bytes,
            "step_bytes": step_bytes, "hole_bytes": holes,
            "layers": {unit.kind: layers[self.network.measured_as(unit.kind)] for unit in self.stages.layers},
            "fixed_s": fixed_s, "chunk_s": chunk_s, "bf16_speedup": self._bf16_speedup(),
        }  # fmt: skip

    def _limit(self, optional: bool) -> None:
        self.optional = optional
        if optional:
            self.memory.limit(self.budget_bytes)

    def _bf16_speedup(self) -> float:
        """Of a product of the size of a small layer's."""
        if not self.device.capabilities.bfloat16:
            return 1.0
        a, b = (torch.zeros(size, device=self.device.torch_device) for size in ((512, 512), (512, 1024)))
        best = [math.inf, math.inf]
        for _ in range(_ROUNDS * _REPEATS):
            for number, dtype in enumerate((torch.float32, torch.bfloat16)):
                began = time.perf_counter()
                (a.to(dtype) @ b.to(dtype)).float()
                self.device.synchronize()
                best[number] = min(best[number], time.perf_counter() - began)
        return best[0] / best[1]

    def _stages(self, layers: Sequence[Unit], chunks: int) -> ExactStages:
        tied = self.stages.output == self.stages.embedding
        output = self.stages.output[:chunks]
        embedding = output if tied else self.stages.embedding[:1]
        return replace(self.stages, layers=tuple(layers), embedding=embedding, output=output, backprop_from=0)

    def _outside_of_layers(self, n: int) -> tuple[float, dict[str, float]]:
        """Seconds of stem and head; and of a chunk of the output table, by what becomes of its logits."""
        chunks = min(2, len(self.stages.output))
        if chunks < 2:
            _, seconds = self._step(self._stages([], 1), StreamedChoice(n, boundaries="moved"))
            return seconds, dict.fromkeys(_LOGITS, 0.0)
        per_chunk: dict[str, float] = {}
        fixed = 0.0
        for logits in _LOGITS:
            choice = StreamedChoice(n, boundaries="moved", logits=logits)
            (_, one), (_, two) = (self._step(self._stages([], count), choice) for count in (1, 2))
            per_chunk[logits] = max(0.0, two - one)
            if logits == "recompute":
                fixed = max(0.0, one - per_chunk[logits])
        return fixed, per_chunk

    def _layer(self, unit: Unit, n: int) -> tuple[int, float, dict[str, float], tuple[int, int]]:
        """The peak of a step with one layer, the bytes that it keeps, its seconds by policy; an example's bytes of
        a boundary and of the context."""
        stages = self._stages([unit], 1)
        choices = {
            "recompute": StreamedChoice(n, boundaries="moved"),
            "keep": StreamedChoice(n, kept_layers=1, boundaries="moved"),
            "offload": StreamedChoice(n, "offload", boundaries="moved"),
        }
        peak, held = 0, {}
        seconds = dict.fromkeys(choices, math.inf)
        began = time.perf_counter()
        for number in range(_ROUNDS):
            # By turns: what else the machine does then meets all of them.
            for policy, choice in choices.items():
                found, taken = self._step(stages, choice)
                seconds[policy] = min(seconds[policy], taken)
                if number == 0 and policy == "recompute":
                    peak = found
                if number == 0 and policy != "offload":
                    held[policy], *between = self._held(stages, choice)
            if time.perf_counter() - began > _ENOUGH_S / 2:
                break
        return peak, max(0, held["keep"] - held["recompute"]), seconds, (between[0] // n, between[1] // n)

    def _trainer(self, stages: ExactStages, choice: StreamedChoice) -> StreamedTrainer:
        gc.collect()  # the one before
        choice = replace(choice, tiled=self.tiled)
        trainer = StreamedTrainer(self.model, self.device, choice, self.network, stages)
        trainer.residency.window.touch_gradients()
        return trainer

    def _step(self, stages: ExactStages, choice: StreamedChoice) -> tuple[int, float]:
        """The peak over what is resident before, and the seconds, of a step without an update."""
        trainer = self._trainer(stages, choice)
        trainer.differentiate(0, choice.micro_batch)
        self.memory.reset_peak()
        before = self.memory.resident_bytes()
        seconds: list[float] = []
        while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_S / 8:
            began = time.perf_counter()
            trainer.differentiate(0, choice.micro_batch)
            self.device.synchronize()
            seconds.append(time.perf_counter() - began)
        peak = self.memory.peak_bytes()
        if not self.optional:
            self.own_bytes = max(self.own_bytes, peak)
        return peak - before, min(seconds)

    def _holes(self, kinds: Mapping[str, Unit], step_bytes: Points) -> Points | None:
        """What the peak of a step grows by if its memory comes from the heap, for the micro-batches measured."""
        if not self.memory.reuses_freed:
            return None
        holes: Points = []
        for n, peak in step_bytes:
            try:
                self._limit(n > step_bytes[0][0])
                found: float = max(self._from_heap(unit, n) for unit in kinds.values())
            except (RuntimeError, MemoryError) as error:
                if not limits.is_out_of_memory(error):
                    raise
                found, self.bounded = peak + self.budget_bytes, True  # more than there is
            finally:
                limits.keep_freed_memory(False)
                limits.return_freed_memory()
                self.memory.lift()
            holes.append((n, max(0, found - peak)))
        return holes

    def _from_heap(self, unit: Unit, n: int) -> int:
        """The peak of a step with one layer over what is resident before, if its memory comes from the heap."""
        trainer = self._trainer(self._stages([unit], 1), StreamedChoice(n, boundaries="moved"))
        trainer.differentiate(0, n)
        before = self.memory.resident_bytes()
        limits.keep_freed_memory(True)
        self.memory.reset_peak()
        for _ in range(_REPEATS):
            trainer.differentiate(0, n)
        return self.memory.peak_bytes() - before

    def _held(self, stages: ExactStages, choice: StreamedChoice) -> tuple[int, int, int]:
        """Bytes resident between forward and backward, and those of a boundary and of the context."""
        trainer = self._trainer(stages, choice)
        return trainer.held_after_forward(0, choice.micro_batch, self.memory.resident_bytes)
