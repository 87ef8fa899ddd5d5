"""The plan: memory by owner, predicted before any work, and the choices that follow from it. No torch here.

A probe (``edgetrain.probe``, cached by what it depends on) measures what a step of one to three layers needs at a few
micro-batches. Bytes and seconds are linear in both, phase by phase: that predicts every depth and batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from devices.limits import LARGEST_FROM_HEAP
from edgetrain import __version__
from edgetrain.errors import BudgetInfeasible
from edgetrain.pieces import buffer_bytes
from edgetrain.spec import ModelSpec, Spec, StackSpec, TextModelSpec
from edgetrain.stack import source_hash
from edgetrain.stages import Shapes, frozen, groups, largest_block
from edgetrain.units import MIB, advised_mib, format_bytes

C = TypeVar("C")

ACTIVATIONS = ("keep", "recompute", "offload")

# Kept free between the predicted peak and the budget: the limit leaves 8.5 MiB for file pages that may yet be read in,
# and a step needs a little of its own. Training uses some 4 of them, for predictions are low by up to 3 per cent.
MARGIN_BYTES = 10 * MIB
MARGIN_OF_ACTIVATIONS = 0.03
# Of activations, and at least: what a heap that is used again has between what is in use. What goes beyond is given
# back (``Governor.hold``).
_HOLES, _LEAST_HOLES_BYTES = 0.25, 6 * MIB
_SAME_TIME = 1.05  # what the probe's clock cannot tell apart
CACHED_BYTES_PER_S = 1.5e9  # moments that are streamed pass through the page cache


@dataclass(frozen=True)
class Choice:
    """What the plan decides. Only the micro-batch touches a bit of the result; it is fixed at creation.

    ``keeps_freed``: freed memory stays with the process, which is faster and takes more of it.
    """

    micro_batch: int
    activations: str
    moments_resident: bool
    keeps_freed: bool = False

    def describe(self) -> str:
        moments = "resident" if self.moments_resident else "streamed"
        freed = ", freed memory used again" if self.keeps_freed else ""
        return f"activations {self.activations}, moments {moments}{freed}"


@dataclass(frozen=True)
class StreamedChoice:
    """What the plan decides for exact training; only the micro-batch touches a bit of the result.

    ``kept_layers``: so many of the last layers stay resident from forward to backward, with what autograd saved;
    ``activations`` "recompute" or "offload": what becomes of those of the others. ``resident``: weights and moments of
    everything stay. ``boundaries`` "memory" or "moved"; ``logits`` "keep", "recompute" or "offload". ``keeps_freed``:
    freed memory stays with the process, which is faster and takes more of it. ``tiled``: of a layer's larger matrices
    and their gradients one tile at a time is in memory; of kept layers then what autograd saved alone.
    """

    micro_batch: int
    activations: str = "recompute"
    kept_layers: int = 0
    resident: bool = False
    boundaries: str = "memory"
    logits: str = "recompute"
    keeps_freed: bool = False
    tiled: bool = False

    def __post_init__(self) -> None:
        if self.tiled and self.resident:
            raise ValueError("what comes in tiles is not resident")

    def describe(self) -> str:
        state = "resident" if self.resident else "streamed"
        return (
            f"weights and moments {state}, activations {self.activations} but for the last {self.kept_layers} layers, "
            f"boundaries {self.boundaries}, logits {self.logits}"
            + (", freed memory used again" if self.keeps_freed else "")
            + (", matrices in tiles" if self.tiled else "")
        )


@dataclass(frozen=True)
class Curve:
    """What steps of 1, 2 and 3 layers took: ``points[layers - 1]`` are (micro_batch, value), ascending; ``bounds``
    likewise are (micro_batch, value) of the first that did not fit, whose value is a lower bound, or None.

    A peak is the largest of several phases (all activations at the end of forward, gradients in the midst of backward),
    each linear in the micro-batch and in the layers: a convex function, so the steepest of its secants go on.
    """

    points: Sequence[Sequence[tuple[int, float]]]
    bounds: Sequence[tuple[int, float] | None] = ()

    def at(self, layers: int, micro_batch: int) -> float:
        """The peak of ``layers`` layers at ``micro_batch``."""
        values = [self._through(points, micro_batch) for points in self.points]
        beyond = max(0, layers - len(values))
        value = values[min(layers, len(values)) - 1] + (beyond * (values[-1] - values[-2]) if beyond else 0.0)
        known = [one[1] for one in self.bounds[:layers] if one is not None and micro_batch >= one[0]]
        return max(0.0, value, *known)

    @staticmethod
    def _through(points: Sequence[tuple[int, float]], micro_batch: int) -> float:
        if micro_batch <= points[0][0]:
            return points[0][1]
        lines = [
            low + (high - low) * (micro_batch - small) / (large - small)
            for (small, low), (large, high) in itertools.pairwise(points)
        ]
        return max(lines, default=points[0][1] * micro_batch / points[0][0])

    def rate(self, layers: int) -> float:
        """Per example, at the largest micro-batch."""
        values = [points[-1][1] / points[-1][0] for points in self.points]
        return max(0.0, values[0] + (layers - 1) * (values[-1] - values[0]) / (len(values) - 1))


@dataclass(frozen=True)
class Probe:
    """What was measured: the process's memory before any block; peaks and times of steps by activations policy.

    ``budget_bytes``: what did not fit into it is not measured; None if all did.
    ``own_bytes``: the peak of those that are always made, below which no budget can be kept.
    ``heap``: how many times the seconds a step takes if freed memory is used again; None: not measured.
    """

    shapes: Shapes
    budget_bytes: int | None
    own_bytes: int
    runtime_bytes: int
    step_bytes: Mapping[str, Curve]
    step_s: Mapping[str, Curve]
    heap: float | None

    def covers(self, budget_bytes: int) -> bool:
        """Whether nothing was left out that fits into this budget."""
        return self.budget_bytes is None or self.budget_bytes >= budget_bytes

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Probe:
        return cls(
            value["shapes"], value["budget_bytes"], value["own_bytes"], value["runtime_bytes"],
            {kind: Curve(**curve) for kind, curve in value["step_bytes"].items()},
            {kind: Curve(points) for kind, points in value["step_s"].items()}, value["heap"],
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """``owners`` add up to ``peak_bytes``, the resident memory that training is predicted to reach."""

    budget_bytes: int
    peak_bytes: int
    smallest_budget_bytes: int
    owners: Mapping[str, int]
    choice: Choice | StreamedChoice
    step_s: float
    session_bytes: int
    written_bytes_per_step: int
    scratch_bytes_per_step: int
    num_threads: int
    bf16_speedup: float = 1.0
    """How many times as fast products would be in bf16, on this machine; 1 where that was not measured."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_plan(
    spec: Spec,
    probe: Probe,
    budget_bytes: int,
    num_threads: int,
    activations: str | None = None,
    *,
    spec_is_fixed: bool = False,
) -> Plan:
    """The fastest way to train inside the budget. ``spec_is_fixed``: the error proposes no other spec.

    Raises:
        BudgetInfeasible: there is none; names the largest owner, the smallest budget, and what lowers it most.
    """
    candidates = list(_candidates(spec, probe, activations))
    smallest = smallest_budget_bytes(spec, probe, activations)
    knob = None if spec_is_fixed else lambda: _best_knob(spec, probe, activations, smallest)
    choice, owners, seconds = choose(candidates, _needed_bytes, budget_bytes, smallest, knob)
    trained = sum(t.section_bytes("weight") for t in largest_block(spec, probe.shapes) if t.trained)
    return Plan(
        budget_bytes=budget_bytes,
        peak_bytes=sum(owners.values()),
        smallest_budget_bytes=smallest,
        owners=owners,
        choice=choice,
        step_s=seconds,
        session_bytes=session_bytes(spec, probe.shapes),
        # Weights and moments at the end of a visit; streamed moments at every step besides.
        written_bytes_per_step=_per_step(trained, choice, spec.train.visit_steps),
        scratch_bytes_per_step=0,
        num_threads=num_threads,
    )


def _per_step(trained_bytes: int, choice: Choice, visit_steps: int) -> int:
    return trained_bytes * (3 if choice.moments_resident else 1 + 2 * visit_steps) // visit_steps


Way = tuple[C, dict[str, int], float]
"""A choice, the bytes that it needs by owner, and the seconds of a step."""


def choose(
    candidates: Sequence[Way[C]],
    needed_bytes: Callable[[Mapping[str, int]], int],
    budget_bytes: int,
    smallest: int,
    knob: Callable[[], str] | None,
) -> Way[C]:
    """The fastest way inside the budget; between equal times the first, which splits and moves least.

    Args:
        needed_bytes: the budget that owners need, margins included.
        smallest: the least that is planned with.
        knob: how the hint of a refusal ends: what else would do.

    Raises:
        BudgetInfeasible: there is none; names the largest owner and the smallest budget.
    """
    fitting = [one for one in candidates if needed_bytes(one[1]) <= budget_bytes]
    if not fitting or budget_bytes < smallest:
        owners = min((owners for _, owners, _ in candidates), key=needed_bytes)
        largest = max(owners, key=lambda name: owners[name])
        raise BudgetInfeasible(
            f"{format_bytes(budget_bytes)} are too little: the least this training can do with is "
            f"{format_bytes(smallest)} ({smallest} bytes), the largest part of it {largest} with "
            f"{format_bytes(owners[largest])}",
            f"Use --memory-budget {advised_mib(smallest)}MiB{knob() if knob else '.'}",
        )
    fastest = min(seconds for _, _, seconds in fitting)
    return next(one for one in fitting if one[2] <= _SAME_TIME * fastest)


def _candidates(spec: Spec, probe: Probe, forced: str | None) -> Iterator[tuple[Choice, dict[str, int], float]]:
    """(choice, bytes by owner, seconds a step) of every way to train, the one that splits and moves least first."""
    model = spec.model
    assert isinstance(model, (ModelSpec, TextModelSpec))
    layers = len(spec.layers_of(0))
    layouts = largest_block(spec, probe.shapes)
    batch_size = spec.train.batch_size
    fixed = spec.train.micro_batch
    for micro_batch in [fixed] if fixed else splits(batch_size):
        for kind in [forced] if forced else ACTIVATIONS:
            # What is offloaded leaves the small parts of its graph between the holes.
            keeping = (True, False) if kind != "offload" and probe.heap is not None else (False,)
            ways = itertools.product((True, False), keeping)
            for moments_resident, keeps_freed in ways:
                owners = {"runtime": probe.runtime_bytes, **buffer_bytes([layouts], moments_resident)}
                owners["activations"] = round(probe.step_bytes[kind].at(layers, micro_batch))
                if keeps_freed:
                    # Of larger tensors none comes from the heap.
                    small = 4 * micro_batch * spec.tokens_per_example * model.width < LARGEST_FROM_HEAP
                    holes = round(_HOLES * owners["activations"]) if small else 0
                    owners["holes"] = max(holes, _LEAST_HOLES_BYTES)
                # Recomputing and offloading only add work, whatever noise the probe's clock had.
                per_example = max(probe.step_s[name].rate(layers) for name in {"keep", kind})
                moved = 0 if moments_resident else 4 * owners["weights"]
                seconds = batch_size * per_example
                # Small pieces cost what a fuller one would have shared; measured by the smallest probe.
                smallest, smallest_s = probe.step_s["keep"].points[0][0]
                overhead = max(0.0, smallest_s - smallest * probe.step_s["keep"].rate(1))
                seconds += (-(-batch_size // micro_batch) - 1) * overhead
                seconds *= probe.heap if keeps_freed and probe.heap is not None else 1.0
                seconds += moved / CACHED_BYTES_PER_S
                yield Choice(micro_batch, kind, moments_resident, keeps_freed), owners, seconds


def largest_micro_batch(spec: Spec) -> int:
    """The largest that a plan may choose."""
    return spec.train.micro_batch or spec.train.batch_size


def splits(batch_size: int) -> list[int]:
    """Micro-batches that split a batch most evenly, largest first."""
    sizes = (-(-batch_size // pieces) for pieces in range(1, batch_size + 1))
    return list(dict.fromkeys(sizes))


def _needed_bytes(owners: Mapping[str, int]) -> int:
    uncertain = round(MARGIN_OF_ACTIVATIONS * owners["activations"]) + owners.get("holes", 0) // 4
    return sum(owners.values()) + MARGIN_BYTES + uncertain


def smallest_budget_bytes(spec: Spec, probe: Probe, activations: str | None) -> int:
    """The least with which training is planned."""
    return max(probe.own_bytes, min(_needed_bytes(owners) for _, owners, _ in _candidates(spec, probe, activations)))


def _best_knob(spec: Spec, probe: Probe, activations: str | None, smallest: int) -> str:
    """The one setting that lowers the smallest budget most."""
    knobs: dict[str, Spec] = {}
    if spec.num_blocks < spec.model.depth and spec.model.family != "recurrent":
        method = replace(spec.diffusion_blocks, num_blocks=spec.model.depth)
        knobs[f"diffusion_blocks.num_blocks={spec.model.depth}"] = replace(spec, diffusion_blocks=method)
    if spec.train.micro_batch > 1:
        knobs["train.micro_batch=1"] = replace(spec, train=replace(spec.train, micro_batch=1))
    needed = {text: smallest_budget_bytes(other, probe, activations) for text, other in knobs.items()}
    text = min(needed, key=lambda name: needed[name], default=None)
    if text is None or needed[text] >= smallest:
        return ", or a smaller model.width."
    return f", or --set {text}, with which {advised_mib(needed[text])}MiB will do."


def session_bytes(spec: Spec, shapes: Shapes) -> int:
    """What the session takes on disk: two slots of weights and moments of all that trains."""
    trained = [stage.layout(shapes) for members in groups(spec).values() for stage in members]
    total = sum(2 * layout.section_bytes(role.name) for layout in trained for role in layout.roles)
    return total + sum(stage.layout(shapes).section_bytes("frozen") for stage in frozen(spec))


def save_probe(spec: Spec, device: str, num_threads: int, measured: Mapping[str, Any]) -> None:
    """Keeps what a probe measured for later plans, if the cache can be written."""
    path = _cache_path(spec, device, num_threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(measured))
        aside.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs a probe at the next start, no more


def forget_probe(spec: Spec, device: str, num_threads: int) -> None:
    """Drops a measurement that turned out to be of something else."""
    with contextlib.suppress(OSError):
        _cache_path(spec, device, num_threads).unlink()


def saved_probe(spec: Spec, device: str, num_threads: int) -> Mapping[str, Any] | None:
    """The measurement in the cache, as JSON."""
    try:
        found = json.loads(_cache_path(spec, device, num_threads).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _cache_path(spec: Spec, device: str, num_threads: int) -> Path:
    return _cache_folder() / f"{_cache_key(spec, device, num_threads)}.json"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetrain"


def _cache_key(spec: Spec, device: str, num_threads: int) -> str:
    """Of all that decides what a probe measures; the depth, the number of blocks and the data's place do not.

    A stack's blocks need not be alike, and its file decides their shapes.
    """
    model, method = dataclasses.asdict(spec.model), dataclasses.asdict(spec.diffusion_blocks)
    if not isinstance(spec.model, StackSpec):
        del model["depth"]
    unmeasured = {"preset", "num_blocks", "sigma_min", "sigma_max", "p_mean", "p_std", "overlap", "sigma_data", "gate"}
    measured = {name: value for name, value in method.items() if name not in unmeasured}
    if spec.is_exact:
        measured |= dataclasses.asdict(spec.exact)
    machine = [platform.processor() or platform.machine(), platform.python_version(), os.cpu_count()]
    versions = [__version__, metadata.version("torch"), metadata.version("numpy")]
    data = dataclasses.asdict(spec.data)
    data["source"] = source_hash(spec.data.source) if isinstance(spec.model, StackSpec) else ""
    key = [model, measured, data, largest_micro_batch(spec), machine, versions, device, num_threads]
    return hashlib.sha256(json.dumps([_PROBE_VERSION, key], sort_keys=True).encode()).hexdigest()[:32]


_PROBE_VERSION = 11
