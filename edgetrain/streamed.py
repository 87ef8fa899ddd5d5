"""Exact gradients of a whole model with a few of its layers in memory: the trainer of the exact objective.

Forward goes layer by layer, all micro-batches of a step through one before the next is loaded, and leaves the
boundaries between layers behind; backward comes from the last layer to the first, runs each again from its boundary
(or has kept or offloaded what autograd saved), and updates it as soon as its gradient is complete. Every layer is
differentiated by itself and micro-batches are added in their order, whatever is resident: that changes no bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devices import Device, Tier
from devices.limits import is_out_of_memory, keep_freed_memory, return_freed_memory, suppress_out_of_memory
from edgetrain.activations import SMALLEST_OFFLOADED_BYTES, Activations, Keep, Offload
from edgetrain.boundaries import Boundaries, Spill
from edgetrain.engine import Rewind, Settle, SmallerMicroBatch, Step, Trainer, halved
from edgetrain.models.base import Boundary, Network
from edgetrain.models.mixed_precision import in_precision
from edgetrain.optim import AdamW, warm_up_kernels
from edgetrain.plan import StreamedChoice
from edgetrain.randomness import Purpose, Stream
from edgetrain.residency import Residency, Source, rows_of
from edgetrain.resident import Resident
from edgetrain.schedule import Settings, Update, learning_rate
from edgetrain.session import BlockProgress
from edgetrain.stages import ExactStages, Stage, Unit, exact_stages, rows_of_chunk
from edgetrain.store import Transaction
from edgetrain.store.layout import TensorSpec
from edgetrain.table import ChunkedCrossEntropy, add_rows


@dataclass(frozen=True)
class _Run:
    """A layer that ran on a micro-batch with history: its inputs, as leaves, and its outputs."""

    carried: dict[str, Tensor]
    context: dict[str, Tensor]
    outputs: Mapping[str, Tensor]


Seen = Callable[[Unit, Resident], None]
"""Is called with a unit when its gradients are complete, in the members of what is bound."""


class _Seed(torch.autograd.Function):
    """A scalar whose gradient by each of the outputs is the one given.

    ``backward(gradient)`` would import sympy, and a sum of products would round.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients = tensors[count:]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return (None, *ctx.gradients, *(None for _ in ctx.gradients))


def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Back-propagates the gradients of the outputs into the leaves."""
    seed: Tensor = _Seed.apply(len(outputs), *outputs, *gradients)
    seed.backward()


class StreamedTrainer(Trainer):
    """Steps on a whole model. What is resident, and what becomes of activations, is the plan's choice."""

    def __init__(
        self,
        session: Source,
        device: Device,
        choice: StreamedChoice,
        network: Network,
        stages: ExactStages | None = None,
    ) -> None:
        """``stages``: those of the session's spec, or what a probe takes in their place."""
        self.session, self.device, self.choice, self.spec = session, device, choice, session.spec
        self.network = in_precision(network, self.spec, device)
        self.stages = stages or exact_stages(self.spec)
        self.optimizer = AdamW(self.spec.optimizer)
        tier = Tier.DISK if device.capabilities.host_addressable else Tier.HOST
        self.residency = Residency(
            session, device, network, self.stages,
            resident=choice.resident, kept=self._kept, tiled_to=tier if choice.tiled else None,
        )  # fmt: skip
        self._hold, self._ahead = self.residency.hold, self.residency.ahead
        self._offload = Offload(device, tier, self.residency.owns)
        self._boundaries = Boundaries(device, choice.boundaries == "moved", tier)
        self._spill = Spill(device, not choice.resident, tier)
        self._runs: dict[tuple[int, int], _Run] = {}
        self._output: ChunkedCrossEntropy | None = None
        self._keeping = True
        self._loses_state = False
        # Below the first unit that trains nothing has a gradient.
        trains = [bool(self.stages.embedding and self.stages.embedding[0].trained) or self.stages.stem.trained]
        trains += [unit.trained for unit in self.stages.layers]
        self._first_trained = trains.index(True) - 1 if True in trains else len(self.stages.layers)
        # What enters this one has no gradient.
        self._first_differentiated = max(self._first_trained, self.stages.backprop_from or -1)

    # -------------------------------------------------------------------------------------------- the engine's calls

    @property
    def _in_bf16(self) -> bool:
        return self.spec.exact.compute == "bf16"

    @property
    def guess(self) -> float:
        return self.network.guess

    @property
    def offloaded_bytes(self) -> int:
        """Bytes moved out: activations, boundaries, logits and gradients."""
        tiles = self.residency.window.tiles
        moved = self._offload.offloaded_bytes + self._boundaries.moved_bytes + self._spill.moved_bytes
        return moved + (tiles.moved_bytes if tiles else 0)

    @property
    def policy(self) -> str:
        if not self._keeping:
            return "recompute"
        return "keep" if self.choice.kept_layers == len(self.stages.layers) else self.choice.activations

    def warm_up(self, progress: BlockProgress) -> None:
        self.residency.touch()
        self.enter(0)
        for keeping in (False, True):
            self._keeping = keeping
            self.differentiate(progress.step, 1)
        if self._in_bf16:
            # A library writes code for each shape of a product, and keeps it. With nothing kept, that fits.
            self._differentiate_all_sizes(progress)
        warm_up_kernels(self.device)
        # Not before: what libraries take once, and keep, would lie between the holes.
        keep_freed_memory(self.choice.keeps_freed)

    def _differentiate_all_sizes(self, progress: BlockProgress) -> None:
        self._keeping = False
        for count in sorted({count for _, count in self._split(self.choice.micro_batch)} - {1}):
            self.differentiate(progress.step, count)
        self._keeping = True

    def run_all_sizes(self, progress: BlockProgress) -> None:
        with suppress_out_of_memory():
            self._differentiate_all_sizes(progress)
        self._keeping = True
        self._clear()

    def differentiate(self, step: int, count: int, seen: Seen | None = None) -> float:
        """The loss of a step on ``count`` examples, without its updates. ``seen`` is shown each unit's gradients."""
        loss = self._forward(step, [(0, count)], differentiates=True)
        self._backward(step, [(0, count)], _Updates(self, step, seen=seen))
        self._clear()
        return loss

    def held_after_forward(self, step: int, count: int, measured: Callable[[], int]) -> tuple[int, int, int]:
        """What is measured between forward and backward; and the bytes of a boundary, and of the context."""
        self._forward(step, [(0, count)], differentiates=True)
        found = measured()
        self._clear()
        _, module = self._hold(self.stages.stem)
        with torch.no_grad():
            boundary = self.network.enter(module, self._draw(step, 0, count, embeds=True))
        carried, context = (sum(t.nbytes for t in one.values()) for one in (boundary.carried, boundary.context))
        return found, carried, context

    def prefetch(self, block: int) -> None:
        self._ahead(self.stages.units)

    def enter(self, block: int) -> None:
        self._clear()
        self.residency.enter()

    def save(self, transaction: Transaction) -> None:
        self.residency.save(transaction)

    def loss(self, progress: BlockProgress, step: int, transaction: Transaction) -> float:
        self.residency.transaction = transaction
        micro_batch = progress.micro_batch
        while True:
            try:
                return self._forward(step, self._split(micro_batch), differentiates=False)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            self._recover()
            micro_batch = halved(micro_batch, step, reason)

    def step(self, progress: BlockProgress, transaction: Transaction, settle: Settle) -> Step | SmallerMicroBatch:
        self.residency.transaction = transaction
        began, step = time.perf_counter(), progress.step
        lr = learning_rate(self.spec.optimizer, step, self.spec.train.steps)
        while True:
            updates = _Updates(self, step, self._settings(progress, lr), settle)
            try:
                batches = self._split(progress.micro_batch)
                loss = self._forward(step, batches, differentiates=True)
                norm = self._backward(step, batches, updates) if self.is_sensible(loss) else math.nan
                self._clear()
                good = loss if math.isfinite(norm) else None
                return Step(0, step, good, norm, lr, time.perf_counter() - began)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)  # the exception itself would keep its frames' tensors alive
            self._recover()
            gave_up = self._give_up()
            if gave_up and not updates.began and not self._loses_state:
                continue
            smaller = None if gave_up else halved(progress.micro_batch, step, reason)
            if updates.began or smaller is None:
                raise Rewind(micro_batch=smaller)
            return SmallerMicroBatch(smaller)

    def _give_up(self) -> bool:
        """Lets nothing wait in memory any more that can wait elsewhere or be made again; False if nothing did."""
        self._loses_state = self.residency.unpin()
        gave_up = self._keeping or self._loses_state or not self._boundaries.moves
        self._keeping, self._boundaries.moves = False, True
        return gave_up

    def _recover(self) -> None:
        """After memory ran out."""
        self._clear()
        self.residency.forget()
        keep_freed_memory(False)
        return_freed_memory()
        self.retries += 1

    def _clear(self) -> None:
        """Forgets what a step holds."""
        self._boundaries.clear()
        self._runs.clear()
        self._output = None

    def _split(self, micro_batch: int) -> list[tuple[int, int]]:
        """(first, count) of each micro-batch of a step."""
        size = self.spec.train.batch_size
        return [(first, min(micro_batch, size - first)) for first in range(0, size, micro_batch)]

    # ------------------------------------------------------------------------------------------------------- forward

    def _draw(self, step: int, first: int, count: int, embeds: bool = False) -> dict[str, Tensor]:
        """A micro-batch on the device; with ``embeds``, the rows of its tokens included."""
        arrays = self.network.draw(step, first, count)
        batch = {name: torch.from_numpy(array).to(self.device.torch_device) for name, array in arrays.items()}
        if embeds and self.stages.embedding:
            batch["embedded"] = self.residency.rows(batch["tokens"])
        return batch

    def _forward(self, step: int, batches: Sequence[tuple[int, int]], differentiates: bool) -> float:
        """The mean loss of the batch; with ``differentiates`` all is left behind that ``_backward`` needs."""
        _, module = self._hold(self.stages.stem)
        with torch.no_grad():
            for number, (first, count) in enumerate(batches):
                boundary = self.network.enter(module, self._draw(step, first, count, embeds=True))
                self._boundaries.put(("x", 0, number), boundary.carried)
                self._boundaries.put(("context", 0, number), boundary.context)
        for position, unit in enumerate(self.stages.layers):
            _, module = self._hold(unit)
            self._ahead(self.stages.layers[position + 1 :] or self.stages.output or [self.stages.head])
            again = differentiates and position >= self._first_differentiated
            policy = self._policy(position) if again else None
            for number, (first, _) in enumerate(batches):
                self.network.prepare(module, self.stages.random_index(position), step, first)
                outputs = self._run(module, position, number, policy)
                if not again:
                    self._boundaries.drop(("x", position, number))
                self._boundaries.put(("x", position + 1, number), outputs)
                if isinstance(policy, Offload) and self._boundaries.moves:
                    self._lighten(self._runs[position, number])
        return self._head(step, batches, differentiates)

    def _policy(self, position: int) -> Activations | None:
        """What becomes of what autograd saves of a layer; None: it runs again in the backward pass."""
        if not self._keeping:
            return None
        if position >= len(self.stages.layers) - self.choice.kept_layers:
            return Keep(passing=self.choice.tiled)
        return self._offload if self.choice.activations == "offload" else None

    def _first_token(self, chunk: int) -> int:
        return chunk * rows_of_chunk(self.spec.language.width)

    @property
    def _kept(self) -> Sequence[Unit]:
        """The layers whose weights stay."""
        if self.choice.tiled:
            return []
        return list(dict.fromkeys(self.stages.layers[len(self.stages.layers) - self.choice.kept_layers :]))

    def _run(self, module: nn.Module, position: int, number: int, policy: Activations | None) -> Mapping[str, Tensor]:
        """A layer's outputs on a micro-batch; with a policy the history stays in ``_runs``."""
        if policy is None:
            carried = self._boundaries.get(("x", position, number))
            with torch.no_grad():
                return self.network.layer(module, Boundary(carried, self._context(number))).carried
        run = self._differentiable(module, position, number, policy)
        self._runs[position, number] = run
        return {name: tensor.detach() for name, tensor in run.outputs.items()}

    def _lighten(self, run: _Run) -> None:
        """Of a run whose saved tensors and boundaries were moved out, nobody reads the values that it holds any more:
        the graph alone is needed."""
        for tensor in (*run.carried.values(), *run.context.values(), *run.outputs.values()):
            if tensor.nbytes >= SMALLEST_OFFLOADED_BYTES:  # smaller ones are saved as they are
                tensor.data = tensor.new_empty(1).expand(tensor.shape)

    def _differentiable(self, module: nn.Module, position: int, number: int, policy: Activations) -> _Run:
        wants_input = position > self._first_differentiated
        carried = {
            name: tensor.requires_grad_(wants_input and tensor.is_floating_point())
            for name, tensor in self._leaves(self._boundaries.get(("x", position, number))).items()
        }
        context = self._context_leaves(number, position > self._first_trained)
        outputs = policy.run(lambda boundary: self.network.layer(module, boundary), Boundary(carried, context))
        return _Run(carried, context, outputs.carried)

    def _context(self, number: int) -> dict[str, Tensor]:
        """What every layer reads of a micro-batch."""
        return self._boundaries.get(("context", 0, number))

    def _context_gradients(self, number: int) -> dict[str, Tensor]:
        """The sums so far, by name."""
        key = ("d_context", 0, number)
        return self._boundaries.get(key) if self._boundaries.has(key) else {}

    @staticmethod
    def _leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in tensors.items()}

    # ---------------------------------------------------------------------------------------------------------- head

    def _head(self, step: int, batches: Sequence[tuple[int, int]], differentiates: bool) -> float:
        """The loss; with ``differentiates`` the head's gradients wait in G, or its hidden states for the output."""
        last = len(self.stages.layers)
        resident, module = self._hold(self.stages.head)
        if self.stages.output:
            return self._output_loss(step, batches, differentiates, module)
        if differentiates and self.stages.head.trained:
            resident.zero_gradients()
        total = 0.0
        for number, (first, count) in enumerate(batches):
            batch = self._draw(step, first, count)
            with torch.set_grad_enabled(differentiates):
                leaves = self._leaves(self._boundaries.get(("x", last, number)))
                carried = {n: t.requires_grad_(differentiates and t.is_floating_point()) for n, t in leaves.items()}
                context = self._context_leaves(number, differentiates)
                loss = self.network.head(module, Boundary(carried, context), batch)
                total += loss.item()
                if differentiates:
                    loss.backward()
                    self._collect(number, carried, context)
            self._boundaries.drop(("x", last, number))
        return total

    def _context_leaves(self, number: int, wants_gradient: bool) -> dict[str, Tensor]:
        return {
            name: tensor.requires_grad_(wants_gradient and tensor.is_floating_point())
            for name, tensor in self._leaves(self._context(number)).items()
        }

    def _output_loss(
        self, step: int, batches: Sequence[tuple[int, int]], differentiates: bool, module: nn.Module
    ) -> float:
        last = len(self.stages.layers)
        logits = self.choice.logits if self._keeping else "recompute"
        output = ChunkedCrossEntropy(self._boundaries, logits, self._in_bf16)
        for number, (first, count) in enumerate(batches):
            batch = self._draw(step, first, count)
            with torch.no_grad():
                carried = self._boundaries.get(("x", last, number))
                hidden = self.network.head(module, Boundary(carried, self._context(number)), batch)
            output.add(hidden, batch["targets"], batch["weights"])
            if not differentiates:
                self._boundaries.drop(("x", last, number))
        for position, unit in enumerate(self.stages.output):
            _, module = self._hold(unit)
            self._ahead(self.stages.output[position + 1 :])
            output.forward(position, self._first_token(position), rows_of(module).detach(), differentiates)
        self._output = output if differentiates else None
        return output.loss()

    # ------------------------------------------------------------------------------------------------------ backward

    def _backward(self, step: int, batches: Sequence[tuple[int, int]], updates: _Updates) -> float:
        """Gradients and updates of everything that trains, from the last unit to the first; the gradient's norm.

        A norm that is not finite means that nothing was changed.

        Raises:
            Rewind: a gradient is not finite, and others were used before it.
        """
        self._finish = updates
        last = len(self.stages.layers)
        if self.stages.output:
            self._output_backward(step, batches)
        elif self.stages.head.trained:
            self._finish(self.stages.head)
        lowest = max(0, self._first_differentiated)
        used = self.stages.layers[lowest:]
        for position in range(last - 1, lowest - 1, -1):
            unit = self.stages.layers[position]
            earlier, later = used[: position - lowest], used[position - lowest + 1 :]
            resident, module = self._hold(unit)
            self._ahead(self.stages.layers[position - 1 : position] if position else [self.stages.stem])
            if unit.trained and unit in later:
                self._spill.take(unit.stages[0].name, resident.gradients)
            elif unit.trained:
                resident.zero_gradients()
            for number, (first, _) in enumerate(batches):
                self.network.prepare(module, self.stages.random_index(position), step, first)
                run = self._runs.pop((position, number), None)
                if run is None:
                    run = self._differentiable(module, position, number, Keep())
                gradients = self._boundaries.get(("dx", 0, number))
                backward([run.outputs[name] for name in gradients], list(gradients.values()))
                del gradients
                self._collect(number, run.carried, run.context)
                self._boundaries.drop(("x", position, number))
            if unit.trained and unit in earlier:
                self._spill.put(unit.stages[0].name, resident.gradients, resident.gradient_bytes)
            elif unit.trained:
                self._finish(unit)
        if self._first_trained < 0:
            self._stem_backward(step, batches)
        return self._finish.end()

    def _collect(self, number: int, carried: Mapping[str, Tensor], context: Mapping[str, Tensor]) -> None:
        """Takes the gradients that arrived at a layer's inputs to where the layer before finds them."""
        found = {name: tensor.grad for name, tensor in carried.items() if tensor.grad is not None}
        self._boundaries.put(("dx", 0, number), found)
        more = {name: tensor.grad for name, tensor in context.items() if tensor.grad is not None}
        if more:
            sums = self._context_gradients(number)
            added = {name: sums[name] + gradient if name in sums else gradient for name, gradient in more.items()}
            self._boundaries.put(("d_context", 0, number), {**sums, **added})

    def _output_backward(self, step: int, batches: Sequence[tuple[int, int]]) -> None:
        output, last = self._output, len(self.stages.layers)
        assert output is not None
        tied = self.stages.output == self.stages.embedding
        for position in reversed(range(len(self.stages.output))):
            unit = self.stages.output[position]
            resident, module = self._hold(unit)
            self._ahead(self.stages.output[position - 1 : position] if position else [self.stages.head])
            rows = rows_of(module)
            if unit.trained:
                resident.zero_gradients()
            output.backward(position, self._first_token(position), rows.detach(), rows.grad)
            if unit.trained and tied:
                self._spill.put(unit.stages[0].name, resident.gradients, resident.gradient_bytes)
            elif unit.trained:
                self._finish(unit)
        resident, module = self._hold(self.stages.head)
        if self.stages.head.trained:
            resident.zero_gradients()
        for number, (first, count) in enumerate(batches):
            leaves = self._leaves(self._boundaries.get(("x", last, number)))
            carried = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in leaves.items()}
            context = self._context_leaves(number, True)
            hidden = self.network.head(module, Boundary(carried, context), self._draw(step, first, count))
            backward([hidden], [output.gradient(number)])
            self._collect(number, carried, context)
            self._boundaries.drop(("x", last, number))
        self._output = None
        if self.stages.head.trained:
            self._finish(self.stages.head)

    def _stem_backward(self, step: int, batches: Sequence[tuple[int, int]]) -> None:
        stem, embedding = self.stages.stem, self.stages.embedding
        embeds = bool(embedding) and embedding[0].trained
        resident, module = self._hold(stem)
        if stem.trained:
            resident.zero_gradients()
        tokens = []
        for number, (first, count) in enumerate(batches):
            batch = self._draw(step, first, count, embeds=True)
            if embeds:
                batch["embedded"].requires_grad_()
            boundary = self.network.enter(module, batch)
            gradients = self._boundaries.get(("dx", 0, number))
            gradients |= self._context_gradients(number)
            self._boundaries.drop(("d_context", 0, number))
            outputs = {**boundary.carried, **boundary.context}
            wanted = [name for name in gradients if outputs[name].requires_grad]
            backward([outputs[name] for name in wanted], [gradients[name] for name in wanted])
            self._boundaries.drop(("dx", 0, number))
            if embeds:
                found = batch["embedded"].grad
                assert found is not None
                self._boundaries.put(("embedded", 0, number), {"gradient": found.flatten(0, 1)})
                tokens.append(batch["tokens"].flatten())
        if stem.trained:
            self._finish(stem)
        for position, unit in enumerate(embedding if embeds else ()):
            resident, module = self._hold(unit)
            self._ahead(embedding[position + 1 :])
            gradient = rows_of(module).grad
            assert gradient is not None
            if self.stages.output == embedding:
                self._spill.take(unit.stages[0].name, resident.gradients)
            else:
                resident.zero_gradients()
            for number in range(len(batches)):
                found = self._boundaries.get(("embedded", 0, number))["gradient"]
                add_rows(gradient, self._first_token(position), tokens[number], found)
            self._finish(unit)

    def _settings(self, progress: BlockProgress, lr: float) -> Settings:
        """How each parameter is updated in the step after ``progress``."""

        def settings(stage: Stage, tensor: TensorSpec) -> Update:
            decays = self.network.decays(stage.kind, tensor.name, tensor.shape)
            rounding = Stream(self.spec.train.seed, Purpose.ROUNDING, stage.index, progress.step)
            return Update(lr, progress.updates + 1, decays, rounding if stage.dtype == "BF16" else None)

        return settings


class _Updates:
    """Takes the complete gradient of one unit after the other: clips it and updates the unit, or if the norm of all is
    to be clipped, lets it wait until all are there."""

    def __init__(
        self,
        trainer: StreamedTrainer,
        step: int,
        settings: Settings | None = None,
        settle: Settle | None = None,
        seen: Seen | None = None,
    ) -> None:
        """Without ``settings`` nothing is updated; ``settle`` is called before the first update."""
        self._trainer, self._step, self._seen = trainer, step, seen
        self._settings, self._settle = settings, settle
        self._waits = trainer.spec.optimizer.clip_over == "global"
        self._waiting: list[Unit] = []
        self._square_norm = 0.0
        self.began = False  # to change anything

    def __call__(self, unit: Unit) -> None:
        trainer = self._trainer
        resident, _ = trainer._hold(unit)
        if self._seen is not None:
            self._seen(unit, resident)
        norm = resident.gradient_norm()
        self._square_norm += norm * norm
        if self._settings is None or not math.isfinite(self._square_norm):
            if self.began:
                raise Rewind(skip=self._step)
            self._settings = None
            resident.forget_tiles()
        elif self._waits:
            trainer._spill.put(f"{unit.stages[0].name}.all", resident.gradients, resident.gradient_bytes)
            self._waiting.append(unit)
        else:
            self._update(unit, resident, norm)

    def _update(self, unit: Unit, resident: Resident, norm: float) -> None:
        trainer = self._trainer
        assert self._settings is not None and self._settle is not None
        if not self.began:
            trainer.residency.transaction, self.began = self._settle(), True
        transaction = trainer.residency.transaction
        assert transaction is not None
        clip = trainer.spec.optimizer.clip
        scale = clip / norm if norm > clip else 1.0
        resident.update(trainer.optimizer, transaction.read, transaction.write, self._settings, scale)
        if not trainer.residency.pins(unit):
            resident.save(transaction.write)

    def end(self) -> float:
        """Updates what waits; the norm of all gradients, not finite if nothing was updated."""
        norm = math.sqrt(self._square_norm) if math.isfinite(self._square_norm) else math.nan
        if self._settings is not None:
            for unit in self._waiting:
                resident, _ = self._trainer._hold(unit)
                self._trainer._spill.take(f"{unit.stages[0].name}.all", resident.gradients)
                self._update(unit, resident, norm)
        return norm
