"""Blocks trained by ONNX Runtime, on the session, draws and counters of torch's training, without it.

The graph of the loss is emitted as for an export, onnxruntime-training adds its gradient (GradientGraphBuilder), and
one InferenceSession computes both; weights are inputs, views of flat buffers, and AdamW works on these in place.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from devices import limits, meter
from edgetrain.engine import Settle, SmallerMicroBatch, Step, Trainer, halved
from edgetrain.errors import BudgetInfeasible, UsageError
from edgetrain.plan import MARGIN_BYTES, MARGIN_OF_ACTIVATIONS, Choice, Plan, session_bytes
from edgetrain.schedule import Update, block_settings, learning_rate
from edgetrain.session import BlockProgress, Session
from edgetrain.spec import ModelSpec, OptimizerSpec, Spec, TextModelSpec
from edgetrain.stages import Shapes, Stage, largest_block, stages_of_block
from edgetrain.store import Transaction
from edgetrain.store.layout import StageLayout, TensorSpec
from edgetrain.training_data import block_draws, guess
from edgetrain.units import format_bytes
from exporters import dit, text, vit
from exporters.graph import Graph
from exporters.runtime import import_onnxruntime, model_errors, session_options

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Floats = NDArray[np.float32]

PLATFORMS = "Linux on x86-64 with Python 3.11"
_TINY = np.float32(1e-12)
_PIECE = 1 << 16  # elements that AdamW works on at a time
_LATER_BYTES = 8 << 20
"""What the session, the data and the display take after the plan was made."""
_CODEBOOK = "codebook"
_REPORT = "Leave --backend out, and please report this."


def check(spec: Spec) -> None:
    """Whether there is a way to train this: UsageError otherwise."""
    method = spec.diffusion_blocks
    if not isinstance(spec.model, (ModelSpec, TextModelSpec)) or spec.is_exact:
        raise UsageError("ONNX Runtime trains by diffusion_blocks alone", "Train it by torch.")
    if (spec.codebook_rows and method.codebook != "frozen") or method.auxiliary:
        raise UsageError(
            "ONNX Runtime trains neither a codebook nor by an auxiliary loss",
            "Set diffusion_blocks.codebook=frozen and diffusion_blocks.auxiliary=0, or train it by torch.",
        )
    if _builder() is None:
        raise UsageError(f"onnxruntime-training is not installed here; it exists for {PLATFORMS}", "Train by torch.")


def _builder() -> Any:
    """onnxruntime's builder of gradients, None in a build without it."""
    import_onnxruntime()
    state = sys.modules["onnxruntime.capi._pybind_state"]
    return getattr(state, "GradientGraphBuilder", None)


def loss_graph(spec: Spec, block: int, shapes: Mapping[str, Sequence[int]]) -> Graph:
    """What training a block of the spec's family makes small."""
    makers = {"vit": vit.loss, "dit": dit.loss}
    return makers.get(spec.model.family, text.loss)(spec, block, shapes)


def inputs_of_loss(spec: Spec, draw: Mapping[str, NDArray[Any]], rows: Floats | None) -> dict[str, NDArray[Any]]:
    """What that graph takes of a ``Draw``, by name. ``rows``: of the codebook (classes, width), where there is one."""
    given = {"input_ids" if name == "tokens" else name: array for name, array in draw.items()}
    if "eps" in draw:
        if rows is None:
            target = draw["images"]
        else:
            target = rows[draw["targets"] if "targets" in draw else draw["labels"]]
            target = target / np.maximum(np.linalg.norm(target, axis=-1, keepdims=True), _TINY)
        given["z"] = target + draw["sigma"].reshape(-1, *[1] * (target.ndim - 1)) * draw["eps"]
    return given


@dataclass(frozen=True)
class _Member:
    """A stage of the block that is resident: its layout, and where its sections begin in the buffers."""

    stage: Stage
    layout: StageLayout
    offset: int

    @property
    def role(self) -> str:
        return "weight" if self.stage.trained else "frozen"

    @property
    def nbytes(self) -> int:
        return self.layout.section_bytes(self.role)


class BlockMath:
    """The buffers of one block, and the loss and gradients of what is in them."""

    def __init__(self, spec: Spec, shapes: Shapes, num_threads: int) -> None:
        self.spec, self.shapes, self._num_threads = spec, shapes, num_threads
        layouts = largest_block(spec, shapes)
        trained = sum(one.section_bytes("weight") for one in layouts if one.trained)
        self._trained = {name: np.zeros(trained, np.uint8) for name in ("weight", "gradient", "m", "v")}
        self._frozen = np.zeros(sum(one.section_bytes("frozen") for one in layouts if not one.trained), np.uint8)
        self.members: list[_Member] = []
        self._session: tuple[int, InferenceSession] | None = None
        self._names: dict[str, str] = {}
        self.block = -1
        _grow_as_asked()
        self.bind(0)

    @property
    def buffer_bytes(self) -> int:
        return sum(one.nbytes for one in self._trained.values()) + self._frozen.nbytes

    def bind(self, block: int) -> None:
        """Makes the buffers those of a block; what is in them is left."""
        stages = stages_of_block(self.spec, block)
        self.block, self.members = block, []
        ends = {True: 0, False: 0}
        for stage in stages:
            member = _Member(stage, stage.layout(self.shapes), ends[stage.trained])
            ends[stage.trained] += member.nbytes
            self.members.append(member)
        if self._session is None or self._session[0] != len(stages):
            self._session = None  # before the next one is made
            self._session = (len(stages), self._differentiated(block))
            self._template = stages
        self._names = {
            f"{known.name}.{tensor.name}": f"{member.stage.name}.{tensor.name}"
            for known, member in zip(self._template, self.members, strict=True)
            for tensor in member.layout.tensors
        }

    def _differentiated(self, block: int) -> InferenceSession:
        """Loss and gradients of a block of as many layers."""
        ort = import_onnxruntime()
        stages = stages_of_block(self.spec, block)
        shapes = {
            f"{stage.name}.{name}": tuple(shape) for stage in stages for name, shape in self.shapes[stage.kind].items()
        }
        graph = loss_graph(self.spec, block, shapes)
        trained = tuple(f"{stage.name}." for stage in stages if stage.trained)
        wanted = {one.name for one in graph.weights() if one.name.startswith(trained)}
        model = graph.model({}, "", {}).SerializeToString()
        with model_errors("the gradient", _REPORT):
            options = session_options(self._num_threads)
            options.add_session_config_entry("session.use_env_allocators", "1")
            builder = _builder()(model, {"loss"}, wanted, "loss", options)
            builder.build()
            return ort.InferenceSession(builder.get_model(), options, providers=["CPUExecutionProvider"])

    def section(self, name: str, member: _Member) -> NDArray[np.uint8]:
        """Of a stage in the buffer "weight", "gradient", "m" or "v", or if it is frozen in theirs."""
        buffer = self._trained[name] if member.stage.trained else self._frozen
        return buffer[member.offset : member.offset + member.nbytes]

    def view(self, name: str, member: _Member, tensor: TensorSpec) -> Floats:
        """A tensor in a buffer."""
        start = member.layout.offset(member.role, tensor.name)
        found: Floats = self.section(name, member)[start : start + tensor.nbytes].view(np.float32)
        return found.reshape(tensor.shape)

    @property
    def gradient(self) -> Floats:
        """All of it, padding, which is zero, included."""
        end = sum(member.nbytes for member in self.members if member.stage.trained)
        return self._trained["gradient"][:end].view(np.float32)

    def run(self, draw: Mapping[str, NDArray[Any]]) -> float:
        """The loss of some examples, as ``block_draws`` has them; adds its gradients to the buffer."""
        weights = {
            f"{member.stage.name}.{tensor.name}": self.view("weight", member, tensor)
            for member in self.members
            for tensor in member.layout.tensors
        }
        codebooks = (self.view("", one, one.layout.tensors[0]) for one in self.members if one.stage.kind == _CODEBOOK)
        given = inputs_of_loss(self.spec, draw, next(codebooks, None))
        assert self._session is not None
        session = self._session[1]
        feeds = {
            one.name: given[one.name] if one.name in given else weights[self._names[one.name]]
            for one in session.get_inputs()
        }
        names = [one.name for one in session.get_outputs()]
        with model_errors("the step", _REPORT):
            outputs = dict(zip(names, session.run(names, feeds), strict=True))
        loss = float(outputs.pop("loss"))
        places = {
            f"{member.stage.name}.{tensor.name}": self.view("gradient", member, tensor)
            for member in self.members
            if member.stage.trained
            for tensor in member.layout.tensors
        }
        for name, gradient in outputs.items():
            places[self._names[name.removesuffix("_grad")]] += gradient
        return loss

    # ---------------------------------------------------------------------------------------------------------- plan

    def plan(self, budget_bytes: int, at_most: int = 0, exactly: bool = False) -> Plan:
        """What training takes, measured here with weights of zero: steps of 1, 2, 4 ... examples, as many as fit.

        Args:
            at_most: examples at a time; 0: the whole batch.
            exactly: so many, not fewer.

        Raises:
            BudgetInfeasible: so many, or one example at a time, do not fit.
        """
        batch_size = self.spec.train.batch_size
        largest = min(at_most or batch_size, batch_size)
        self._touch()
        idle = meter.usage().resident_bytes

        def owners(taken_bytes: float) -> dict[str, int]:
            return {
                "runtime": idle - self.buffer_bytes + _LATER_BYTES,
                "weights, gradients, moments": self.buffer_bytes,
                "activations": int(taken_bytes * (1 + MARGIN_OF_ACTIVATIONS)),
            }

        def needed(taken_bytes: float) -> int:
            return sum(owners(taken_bytes).values()) + MARGIN_BYTES

        sizes, taken, seconds = [1], *([one] for one in self._measured(1, idle))
        # Few examples find room in what is there: the slope is that of the largest two that were measured. What a
        # measurement takes stays taken: none is made of more than will fit.
        while 2 * sizes[-1] <= largest and needed(2 * taken[-1]) <= budget_bytes:
            sizes.append(2 * sizes[-1])
            for known, one in zip((taken, seconds), self._measured(sizes[-1], idle), strict=True):
                known.append(max(known[-1], one))
        slope = (taken[-1] - taken[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else taken[0]

        def taken_by(count: int) -> float:
            return float(np.interp(count, sizes, taken)) + slope * max(0, count - sizes[-1])

        count = largest
        while not exactly and count > 1 and needed(taken_by(count)) > budget_bytes:
            count = (count + 1) // 2
        at_least, planned = needed(taken_by(largest if exactly else 1)), owners(taken_by(count))
        if at_least > budget_bytes:
            owner = max(planned, key=lambda name: planned[name])
            fewer = ", or leave train.micro_batch out" if count > 1 else ""
            raise BudgetInfeasible(
                f"the least this training can do with is {format_bytes(at_least)}, over the budget of "
                f"{format_bytes(budget_bytes)}; {owner} takes {format_bytes(planned[owner])}",
                f"Set --memory-budget {-(-at_least >> 20)}MiB{fewer}.",
            )
        trained = sum(member.nbytes for member in self.members if member.stage.trained)
        return Plan(
            budget_bytes=budget_bytes,
            peak_bytes=sum(planned.values()),
            smallest_budget_bytes=at_least,
            owners=planned,
            choice=Choice(count, "keep", True),
            step_s=seconds[-1] / sizes[-1] * batch_size,
            session_bytes=session_bytes(self.spec, self.shapes),
            written_bytes_per_step=3 * trained // self.spec.train.visit_steps,
            scratch_bytes_per_step=0,
            num_threads=self._num_threads,
        )

    def _zeros(self, stage: int, step: int, first: int, count: int) -> tuple[NDArray[Any], ...]:
        """In place of ``training_batches``."""
        if not isinstance(self.spec.model, TextModelSpec):
            shape = (count, *self.spec.image_model.image_shape)
            return np.zeros(shape, np.float32), np.zeros(count, np.int64)
        ids = np.zeros((count, self.spec.text.length), np.int64)
        return ids, ids, np.ones(ids.shape, np.float32)

    def _touch(self) -> None:
        for buffer in (*self._trained.values(), self._frozen):
            buffer.fill(0)

    def _measured(self, count: int, idle: int) -> tuple[float, float]:
        """What a step of ``count`` examples takes at most beyond ``idle`` bytes, and its seconds."""
        draw = block_draws(self.spec, self._zeros)(0, 0, 0, count)
        self.run(draw)
        limits.return_freed_memory()
        meter.reset_peak()
        began = time.perf_counter()
        self.run(draw)
        return float(max(0, meter.usage().peak_bytes - idle)), time.perf_counter() - began


@functools.cache
def _grow_as_asked() -> None:
    """Makes onnxruntime's memory grow by what is asked for: it doubles otherwise, which no plan could know."""
    import_onnxruntime()
    state = sys.modules["onnxruntime.capi._pybind_state"]
    state.set_default_logger_severity(3)
    whose = state.OrtMemoryInfo("Cpu", state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, state.OrtMemType.DEFAULT)
    as_requested = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1,
                    "max_dead_bytes_per_chunk": -1}  # fmt: skip
    state.create_and_register_allocator(whose, state.OrtArenaCfg(as_requested))


class OrtTrainer(Trainer):
    """Steps on one block, which stays resident from the beginning of a visit to its end."""

    def __init__(self, session: Session, math: BlockMath, batches: Any) -> None:
        """``batches``: the ``training_batches`` of the session's data."""
        self.session, self.math, self.spec = session, math, session.spec
        self._draw = block_draws(self.spec, batches)

    @property
    def offloaded_bytes(self) -> int:
        return 0

    @property
    def policy(self) -> str:
        return "keep"

    @property
    def guess(self) -> float:
        return guess(self.spec)

    def warm_up(self, progress: BlockProgress) -> None:
        self.enter(0)
        self._accumulate(progress.step, 1, 1)
        adamw(self.spec.optimizer, Update(0.0, 1, True), *(np.zeros(4, np.float32) for _ in range(4)))
        try:  # the code of the error path is read in now, not when memory is short
            np.empty(1 << 50, np.uint8)
        except MemoryError as error:
            limits.is_out_of_memory(error)

    def prefetch(self, block: int) -> None:
        self.session.store.prefetch(stage.name for stage in stages_of_block(self.spec, block))

    def enter(self, block: int) -> None:
        self.math.bind(block)
        for member, name, role in self._sections():
            self.session.store.read(member.stage.name, role, self.math.section(name, member).data)

    def save(self, transaction: Transaction) -> None:
        for member, name, role in self._sections():
            if member.stage.trained:
                transaction.write(member.stage.name, role, self.math.section(name, member).data)

    def _sections(self) -> Sequence[tuple[_Member, str, str]]:
        """(member, buffer, role) of all that is stored."""
        return [
            (member, role if member.stage.trained else "", role)
            for member in self.math.members
            for role in (("weight", "m", "v") if member.stage.trained else ("frozen",))
        ]

    def step(self, progress: BlockProgress, transaction: Transaction, settle: Settle) -> Step | SmallerMicroBatch:
        began = time.perf_counter()
        step, micro_batch = progress.step, progress.micro_batch
        try:
            loss = self._accumulate(step, self.spec.train.batch_size, micro_batch)
        except MemoryError as error:
            self.retries += 1
            limits.return_freed_memory()
            return SmallerMicroBatch(halved(micro_batch, step, str(error)))
        gradient = self.math.gradient
        norm = float(np.sqrt(np.dot(gradient, gradient))) if self.is_sensible(loss) else float("nan")
        if np.isfinite(norm):
            settle()
            if norm > self.spec.optimizer.clip:
                gradient *= np.float32(self.spec.optimizer.clip / norm)
            self._update(progress)
        lr = learning_rate(self.spec.optimizer, step, self.spec.train.steps)
        return Step(self.math.block, step, loss if np.isfinite(norm) else None, norm, lr, time.perf_counter() - began)

    def _update(self, progress: BlockProgress) -> None:
        settings = block_settings(self.session, self.math.block, progress)
        for member in self.math.members:
            for tensor in member.layout.tensors if member.stage.trained else ():
                views = (self.math.view(name, member, tensor).reshape(-1) for name in ("weight", "gradient", "m", "v"))
                adamw(self.spec.optimizer, settings(member.stage, tensor), *views)

    def loss(self, progress: BlockProgress, step: int, transaction: Transaction) -> float:
        micro_batch = progress.micro_batch
        while True:
            try:
                return self._accumulate(step, self.spec.train.batch_size, micro_batch)
            except MemoryError as error:
                reason = str(error)
            micro_batch = halved(micro_batch, step, reason)

    def _accumulate(self, step: int, batch_size: int, micro_batch: int) -> float:
        """Gradients of a whole batch; the mean loss. Stops at the first that is not finite."""
        self.math.gradient.fill(0)
        total = 0.0
        for first in range(0, batch_size, micro_batch):
            count = min(micro_batch, batch_size - first)
            total += self.math.run(self._draw(self.math.block, step, first, count))
            if not np.isfinite(total):
                break
        return total


def adamw(  # noqa: PLR0917
    spec: OptimizerSpec, update: Update, weight: Floats, gradient: Floats, m: Floats, v: Floats
) -> None:
    """One update of AdamW with decoupled weight decay (arXiv 1711.05101), in place, by the formulas of torch's kernel.
    All are flat and of one size."""
    # 1 - beta2 in float32 would be wrong by 5e-5.
    new1, new2, beta2 = np.float32(1 - spec.beta1), np.float32(1 - spec.beta2), np.float32(spec.beta2)
    step_size = np.float32(update.lr / (1 - spec.beta1**update.number))
    root = np.float32((1 - spec.beta2**update.number) ** 0.5)
    kept = np.float32(1 - update.lr * spec.weight_decay) if update.decays else np.float32(1)
    for start in range(0, len(weight), _PIECE):
        part = slice(start, start + _PIECE)
        w, g, m_, v_ = weight[part], gradient[part], m[part], v[part]
        w *= kept
        m_ += new1 * (g - m_)
        v_ *= beta2
        v_ += new2 * (g * g)
        w -= step_size * (m_ / (np.sqrt(v_) / root + np.float32(spec.eps)))
