"""A trained or imported language model, used within a budget: next-token logits, and the loss on held-out text.

As many layers as the budget has room for stay in memory; the others pass one window, each time they are needed. What is
resident changes no bit. Rows of the embedding are looked up by reads, and logits are taken chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from devices import Device, Tier
from devices.limits import is_out_of_memory, return_freed_memory
from edgetrain.boundaries import Boundaries
from edgetrain.checkpoint import Checkpoint
from edgetrain.data.text import TextDataset
from edgetrain.errors import BudgetBroken, BudgetInfeasible
from edgetrain.governor import Governor
from edgetrain.models.attention import KeyValue
from edgetrain.models.base import Boundary
from edgetrain.models.language import LanguageNetwork
from edgetrain.optim import warm_up_kernels
from edgetrain.pieces import buffer_bytes
from edgetrain.resident import Resident
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec, Spec, TextSpec, TrainSpec
from edgetrain.stages import ExactStages, Stage, Unit, exact_stages, rows_of_chunk
from edgetrain.store import Place
from edgetrain.store.layout import ITEM_BYTES, StageLayout, TensorSpec
from edgetrain.store.slot import ExternalFiles
from edgetrain.table import ChunkedCrossEntropy, Rows, gather
from edgetrain.units import format_bytes

_OWN_BYTES = 4 << 20
"""What attention's kernel and Python take beside what is counted."""
_MODULE_BYTES = 128 << 10
"""Of the Python objects that a resident layer takes beside its weights."""
_CHUNK_BYTES = 16 << 20
"""What is held, at most, of all examples that pass a layer together in an evaluation."""
_WARM_UP_TOKENS = 3
_WARM_UP_BYTES = 18 << 20
"""Some: of the code, tables and threads that the first run of every operation leaves in memory."""


Examples = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Inputs, targets and weights, each (n, length)."""


class Weights(Protocol):
    """Where a language model's weights come from. ``read`` is as a store's: (stage, role, into, offset)."""

    @property
    def spec(self) -> Spec: ...
    @property
    def stages(self) -> ExactStages: ...
    def layout(self, stage: Stage) -> StageLayout: ...
    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None: ...
    def prefetch(self, stages: Iterable[str]) -> None: ...


class SessionWeights:
    """Those that a session has committed, adapters and imported ones included."""

    def __init__(self, session: Session) -> None:
        self.spec = session.spec
        self.stages = exact_stages(session.spec)
        self.layout = session.layout
        self.read = session.store.read
        self.prefetch = session.store.prefetch


class FolderWeights:
    """Those of a Hugging Face folder, read where they are: every stage is frozen."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.spec = Spec(model=checkpoint.model, data=TextSpec(length=1), train=TrainSpec(objective="exact"))
        self.stages = _frozen(exact_stages(self.spec))
        self._files = {stage.name: _files(checkpoint, stage) for stage in self.stages.stages}

    def layout(self, stage: Stage) -> StageLayout:
        return self._files[stage.name].layout

    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        self._files[stage].read("frozen", role, into.cast("B"), offset)

    def prefetch(self, stages: Iterable[str]) -> None:
        for stage in stages:
            self._files[stage].prefetch("frozen", ["frozen"])


def _frozen(stages: ExactStages) -> ExactStages:
    def unit(one: Unit) -> Unit:
        return replace(one, stages=tuple(replace(stage, sharing="frozen") for stage in one.stages))

    return ExactStages(
        unit(stages.stem),
        tuple(map(unit, stages.layers)),
        unit(stages.head),
        tuple(map(unit, stages.embedding)),
        tuple(map(unit, stages.output)),
    )


def _files(checkpoint: Checkpoint, stage: Stage) -> ExternalFiles:
    """A stage's tensors in the checkpoint; "output.002" is the third chunk of the rows of "output"."""
    whole, is_chunk, number = stage.name.partition(".")
    tensors, places = [], {}
    for (owner, name), source in sorted(checkpoint.tensors.items()):
        if owner != whole:
            continue
        shape, position = source.shape, source.position
        if is_chunk:
            rows, width = shape
            first = int(number) * rows_of_chunk(width)
            shape = (min(rows - first, rows_of_chunk(width)), width)
            position += first * width * ITEM_BYTES[source.dtype]
        tensors.append(TensorSpec(name, shape, source.dtype))
        places[name] = Place(source.path, position, source.dtype)
    return ExternalFiles(StageLayout(stage.name, tuple(tensors), trained=False), places)


class LanguageModel:
    """A language model for use, not for training. Nothing is in memory before it is needed or ``within`` is entered."""

    def __init__(self, weights: Weights, device: Device) -> None:
        self.weights, self.device = weights, device
        self.spec: LanguageModelSpec = weights.spec.language
        self.stages = weights.stages
        self.network = LanguageNetwork(weights.spec, None)
        self._layouts = {stage.name: weights.layout(stage) for stage in self.stages.stages}
        # An embedding of its own is only looked up.
        self._units = [self.stages.stem, *self.stages.layers, self.stages.head, *self.stages.output]
        self._window: Resident | None = None
        self._in_window: Unit | None = None
        self._skeletons: dict[str, nn.Module] = {}
        self._pinned: dict[Unit, tuple[Resident, nn.Module]] = {}

    # ------------------------------------------------------------------------------------------------------- memory

    @contextmanager
    def within(self, budget_bytes: int | None, least_bytes: int, most_bytes: int) -> Iterator[int]:
        """Everything inside runs under the budget; without one everything is resident and nothing is limited.

        Args:
            least_bytes: what must be free for the computation itself.
            most_bytes: what it can make use of. The rest of the budget keeps layers in memory.

        Yields:
            The bytes that are free for the computation.

        Raises:
            BudgetInfeasible: not even one layer at a time fits beside ``least_bytes``; says what would do.
            BudgetBroken: at the end, if the budget was exceeded.
        """
        if budget_bytes is None:
            self._pin(math.inf)
            yield most_bytes
            return
        # Before anything is taken: the process would not get back below a peak.
        self._require(budget_bytes, least_bytes + self._window_bytes, _WARM_UP_BYTES)
        self.warm_up()
        self._require(budget_bytes, least_bytes)
        for_computing = min(most_bytes, self.device.memory.free_bytes(budget_bytes))
        self._pin(self.device.memory.free_bytes(budget_bytes) - for_computing)
        governor = Governor(budget_bytes, self.device.memory)
        with governor.hold():
            yield for_computing
        governor.check()

    def _require(self, budget_bytes: int, needed_bytes: int, more_bytes: int = 0) -> None:
        """Refuses a budget that has no room for ``needed_bytes``. One that has it may need some ``more_bytes``."""
        memory = self.device.memory
        lacking = max(needed_bytes - memory.free_bytes(budget_bytes), memory.peak_bytes() - budget_bytes)
        if lacking > 0:
            smallest = budget_bytes + lacking + more_bytes
            raise BudgetInfeasible(
                f"a budget of {format_bytes(budget_bytes)} is too small: with one layer at a time in memory, the keys "
                f"and values of the tokens and what is computed take {format_bytes(needed_bytes)} beside the runtime",
                f"Try --memory-budget {format_bytes(math.ceil(1.05 * smallest))}, or fewer tokens.",
            )

    @property
    def _window_bytes(self) -> int:
        return self._bytes(self._units)

    def _bytes(self, units: Sequence[Unit]) -> int:
        """Of buffers that hold any one of the units."""
        sizes = buffer_bytes([self._of(unit) for unit in units], False)
        return sizes["weights"] + sizes["frozen"] + _MODULE_BYTES

    def _of(self, unit: Unit) -> list[StageLayout]:
        return [self._layouts[stage.name] for stage in unit.stages]

    def _pin(self, free_bytes: float) -> None:
        """Keeps in memory what ``free_bytes`` hold; if that is everything, there is no window any more."""
        units = {unit: self._bytes([unit]) for unit in self._units}
        if sum(units.values()) <= free_bytes + (self._window_bytes if self._window else 0):
            self._close_window()
            free_bytes = math.inf
        for unit, nbytes in units.items():
            if nbytes <= free_bytes:
                free_bytes -= nbytes
                resident = Resident(self.device, [self._of(unit)], False, trains=False)
                module = self._build(unit.kind)
                self._load(resident, unit, module)
                self._pinned[unit] = (resident, module)

    def give_up(self) -> bool:
        """After memory ran out: lets half of what is resident pass the window from now on; False if nothing was."""
        self._in_window = None
        some = list(self._pinned)[: (len(self._pinned) + 1) // 2]
        for unit in some:
            resident, _ = self._pinned.pop(unit)
            _release(resident)
        return_freed_memory()
        return bool(some)

    def _close_window(self) -> None:
        if self._window is not None:
            self._skeletons.clear()  # they hold views of it
            _release(self._window)
        self._window = self._in_window = None

    def _build(self, kind: str) -> nn.Module:
        if kind.startswith("output") or kind.startswith("embedding"):
            return Rows()
        with torch.device("meta"):
            return self.network.build(kind)

    def _load(self, resident: Resident, unit: Unit, module: nn.Module) -> None:
        resident.bind([(stage, self._layouts[stage.name], module) for stage in unit.stages])
        resident.load(self.weights.read)

    def _hold(self, unit: Unit, following: Sequence[Unit] = ()) -> nn.Module:
        """The module of a unit with its weights, until the next call. The system reads ``following`` ahead."""
        for ahead in following[:1]:
            if ahead not in self._pinned:
                self.weights.prefetch(stage.name for stage in ahead.stages)
        if unit in self._pinned:
            return self._pinned[unit][1]
        if self._window is None:
            self._window = Resident(self.device, [self._of(one) for one in self._units], False, trains=False)
        if (module := self._skeletons.get(unit.kind)) is None:
            module = self._skeletons[unit.kind] = self._build(unit.kind)
        if self._in_window is not unit:
            self._in_window = None
            self._load(self._window, unit, module)
            self._in_window = unit
        return module

    def workspace_bytes(self, tokens: int, length: int) -> int:
        """What a layer takes for its work on ``tokens`` tokens at once, in sequences of ``length``."""
        model = self.spec
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        attention = 3 * model.width + 4 * queries + 5 * keys
        mlp = 6 * model.width + 3 * model.mlp_width
        mask = length * length if 0 < model.sliding_window < length else 0
        return 4 * (tokens * max(attention, mlp) + mask) + _OWN_BYTES

    def context_bytes(self, max_tokens: int) -> int:
        """What a ``Context`` of that many tokens takes, and the choice of a token by its logits."""
        model = self.spec
        return 4 * 2 * model.depth * model.kv_heads * model.head_dim * max_tokens + 64 * model.vocab_size

    @torch.no_grad()
    def warm_up(self) -> None:
        """Runs every operation once, so that the limit on memory can be drawn around its code and tables."""
        few = [self.stages.layers[0]]
        self._next_logits(np.zeros(_WARM_UP_TOKENS, np.int64), [self._cache(_WARM_UP_TOKENS)], few)
        zeros = np.zeros((1, _WARM_UP_TOKENS), np.int64)
        self._loss((zeros, zeros, np.ones(zeros.shape, np.float32)), 1, few, self.stages.output[:1])
        if self._window is not None:
            self._window.touch()
        self._in_window = None
        warm_up_kernels(self.device)

    # -------------------------------------------------------------------------------------------------------- logits

    def _cache(self, max_tokens: int) -> KeyValue:
        model = self.spec
        return KeyValue(1, model.kv_heads, max_tokens, model.head_dim, device=self.device.torch_device)

    def _enter(self, tokens: NDArray[np.int64], offset: int) -> Boundary:
        """tokens (n, length), the first at position ``offset`` -> (n, length, width)."""
        chunks = [(unit.stages[0].name, self._layouts[unit.stages[0].name]) for unit in self.stages.embedding]
        embedded = gather(tokens, chunks, self.weights.read).to(self.device.torch_device)
        if self.spec.family == "gpt2":
            embedded = self._hold(self.stages.stem, self.stages.layers)(embedded, offset)
        return Boundary({"hidden": embedded}, {})

    def _next_logits(
        self, tokens: NDArray[np.int64], caches: Sequence[KeyValue], layers: Sequence[Unit]
    ) -> NDArray[np.float32]:
        """The logits after ``tokens`` (length,), which follow on what the caches hold -> (vocab_size,)."""
        boundary = self._enter(tokens[None], caches[0].length)
        for number, (unit, cache) in enumerate(zip(layers, caches, strict=True)):
            module = self._hold(unit, layers[number + 1 :] or self.stages.output)
            boundary = self.network.layer(module, boundary, cache)
        last = boundary.advance({"hidden": boundary.carried["hidden"][:, -1:]})
        hidden = self.network.head(self._hold(self.stages.head), last, {})  # (1, width)
        logits = np.empty(self.spec.vocab_size, np.float32)
        for first_token, rows in self._output(self.stages.output):
            logits[first_token : first_token + len(rows)] = (hidden @ rows.T)[0].cpu().numpy()
        return logits

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64], caches: Sequence[KeyValue] | None = None) -> NDArray[np.float32]:
        """Of every token (n, length) -> (n, length, vocab_size). ``caches``, of each layer, keep what it sees."""
        boundary = self._enter(tokens, 0)
        for number, unit in enumerate(self.stages.layers):
            module = self._hold(unit, self.stages.layers[number + 1 :])
            boundary = self.network.layer(module, boundary, None if caches is None else caches[number])
        hidden = self.network.head(self._hold(self.stages.head), boundary, {})  # (n * length, width)
        logits = np.empty((len(hidden), self.spec.vocab_size), np.float32)
        for first_token, rows in self._output(self.stages.output):
            logits[:, first_token : first_token + len(rows)] = (hidden @ rows.T).cpu().numpy()
        return logits.reshape(*tokens.shape, -1)

    def _output(self, chunks: Sequence[Unit]) -> Iterator[tuple[int, Tensor]]:
        """(first token, rows (rows, width)) of each chunk of the output table."""
        for number, unit in enumerate(chunks):
            module = self._hold(unit, chunks[number + 1 :] or self.stages.layers)
            yield number * rows_of_chunk(self.spec.width), module.get_parameter("weight").detach()

    # ---------------------------------------------------------------------------------------------------------- loss

    @torch.no_grad()
    def loss(self, examples: Examples, micro_batch: int) -> float:
        """The summed loss of examples that pass each layer before the next is loaded."""
        return self._loss(examples, micro_batch, self.stages.layers, self.stages.output)

    def _loss(self, examples: Examples, micro_batch: int, layers: Sequence[Unit], chunks: Sequence[Unit]) -> float:
        inputs, targets, weights = examples
        parts = [slice(first, first + micro_batch) for first in range(0, len(inputs), micro_batch)]
        boundaries = [self._enter(inputs[part], 0) for part in parts]
        for number, unit in enumerate(layers):
            module = self._hold(unit, layers[number + 1 :] or chunks)
            for i, boundary in enumerate(boundaries):
                boundaries[i] = self.network.layer(module, boundary)
        output = ChunkedCrossEntropy(Boundaries(self.device, False, Tier.HOST), "recompute")
        module = self._hold(self.stages.head)
        for part in reversed(parts):
            hidden = self.network.head(module, boundaries.pop(), {})  # (n * length, width)
            wanted, weight = (torch.from_numpy(x[part].reshape(-1)).to(hidden.device) for x in (targets, weights))
            output.add(hidden, wanted, weight)
        for number, (first_token, rows) in enumerate(self._output(chunks)):
            output.forward(number, first_token, rows, differentiates=False)
        return output.loss()


class Context:
    """What a model has read of one text: keys and values of at most ``max_tokens`` tokens."""

    def __init__(self, model: LanguageModel, max_tokens: int) -> None:
        self._model = model
        self._caches = [model._cache(max_tokens) for _ in model.stages.layers]

    @torch.no_grad()
    def read(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads on, ``tokens`` (length,) in one pass; the logits (vocab_size,) of what comes next.

        Raises:
            BudgetBroken: memory ran out, and no layer that was resident was left to give up.
        """
        length = self._caches[0].length
        while True:
            try:
                return self._model._next_logits(tokens, self._caches, self._model.stages.layers)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            for cache in self._caches:
                cache.length = length
            if not self._model.give_up():
                raise BudgetBroken(
                    f"reading {len(tokens)} tokens with one layer at a time in memory needs more than there is: "
                    f"{reason}",
                    "Raise --memory-budget, or shorten the prompt.",
                )


@dataclass(frozen=True)
class Evaluation:
    """``loss``: the mean cross-entropy, natural, of the ``num_tokens`` targets that count."""

    loss: float
    num_examples: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_language(
    model: LanguageModel, dataset: TextDataset, micro_batch: int, budget_bytes: int | None, limit: int | None = None
) -> Evaluation:
    """The loss on the examples of ``dataset``, or the first ``limit`` of them.

    Where memory runs out, fewer layers stay resident, then micro-batches are half as large.

    Raises:
        BudgetInfeasible, BudgetBroken: the budget does not allow one example at a time, or was exceeded.
    """
    num_examples = dataset.num_examples if limit is None else min(limit, dataset.num_examples)
    micro_batch = min(micro_batch, num_examples)
    length, width = dataset.length, model.spec.width
    logits_bytes = 2 * 4 * length * min(rows_of_chunk(width), model.spec.vocab_size)
    # Its hidden states twice, while those after the head replace those before it; tokens, targets and weights.
    example_bytes = length * (2 * 4 * width + 64)

    def needed(examples: int) -> int:
        work = model.workspace_bytes(examples * length, length)
        return max(work, _OWN_BYTES + examples * logits_bytes) + examples * example_bytes

    total, num_tokens, start = 0.0, 0, 0
    with model.within(budget_bytes, needed(1), needed(micro_batch) + _CHUNK_BYTES) as room_bytes:
        while micro_batch > 1 and needed(micro_batch) > room_bytes:
            micro_batch = (micro_batch + 1) // 2
        chunk = micro_batch + max(0, room_bytes - needed(micro_batch)) // example_bytes
        while start < num_examples:
            end = min(start + chunk, num_examples)
            try:
                examples = dataset.read(np.arange(start, end, dtype=np.int64))
                total += model.loss(examples, micro_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                num_tokens += int(np.count_nonzero(examples[2]))
                start = end
                continue
            if model.give_up():
                continue
            if chunk == 1:
                raise BudgetBroken(
                    f"evaluating one example of {length} tokens at a time needs more memory than there is: {reason}",
                    "Raise --memory-budget.",
                )
            chunk = (chunk + 1) // 2
            micro_batch = min((micro_batch + 1) // 2, chunk)
    return Evaluation(total / max(1, num_tokens), num_examples, num_tokens)


def _release(resident: Resident) -> None:
    resident.weights.release()
    resident.frozen.release()
