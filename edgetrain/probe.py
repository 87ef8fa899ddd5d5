"""Measures what a training step needs, in a process that does nothing else.

The probe itself stays small: weights are never written, so they are the kernel's one page of zeros, all gradients lie
over each other in one buffer, and beyond what is always measured it works under the budget's limit.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devices import limits
from devices.memory import Memory
from edgetrain.spec import Spec

_SMALLEST_TENSOR_BYTES = 128 << 10  # below 64 KiB tensors come from the heap, where bytes are no longer linear
_ALWAYS_MEASURED = 2  # layers, and micro-batches: the least that a line can be drawn through
_REPEATS, _ENOUGH_S = 3, 0.1  # of a step: memory does not vary, the machine's mood does, least so in long steps


def measure(spec: Spec, device_kind: str, budget_bytes: int) -> dict[str, object]:
    """The fields of the probe of the spec's objective.

    ``limits.prepare_process`` comes first, and torch's number of threads.
    """
    return (_measure_streamed if spec.is_exact else _measure_block)(spec, device_kind, budget_bytes)


def _measure_streamed(spec: Spec, device_kind: str, budget_bytes: int) -> dict[str, object]:

    from edgetrain import streamed_probe
    from edgetrain.importing import language_shapes
    from edgetrain.models import build_network
    from edgetrain.spec import LanguageModelSpec, StackSpec
    from edgetrain.training_data import training_batches

    if isinstance(spec.model, LanguageModelSpec):
        network = build_network(spec, _text(spec))
        shapes: Any = language_shapes(spec)
    else:
        noise = None if isinstance(spec.model, StackSpec) else training_batches(spec, _noise(spec))
        network = build_network(spec, noise)  # of a stack, its own data
        shapes = streamed_probe.shapes_of(spec, network)
    return streamed_probe.measure(spec, network, shapes, device_kind, budget_bytes)


def _text(spec: Spec) -> Any:
    """Text of the right length, all of one token."""
    import numpy as np

    class Text:
        num_examples = 1 << 20

        def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tokens = np.zeros((len(indices), spec.text.length), np.int64)
            return tokens, tokens, np.ones(tokens.shape, np.float32)

    return Text()


def _noise(spec: Spec) -> Any:
    """Data of the right size, so that reading a batch is measured too."""
    import numpy as np

    from edgetrain.data import Dataset
    from edgetrain.spec import TextModelSpec

    if isinstance(spec.model, TextModelSpec):
        return _text(spec)

    class Noise(Dataset):
        def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images = np.zeros((len(indices), *self.image_shape), np.uint8)
            return images, indices % self.num_classes

    channels, height, width = spec.image_model.image_shape
    names = tuple(map(str, range(spec.image_model.num_classes)))
    return Noise("noise", "train", 1 << 20, (channels, height, width), names)


def _measure_block(spec: Spec, device_kind: str, budget_bytes: int) -> dict[str, object]:
    """The fields of a ``plan.Probe``."""
    import torch

    import devices
    from edgetrain.activations import Activations, Keep, Offload, Recompute
    from edgetrain.blockwise import bind, build_modules
    from edgetrain.models import build_family
    from edgetrain.objectives.base import Block, Objective
    from edgetrain.objectives.diffusion_blocks import diffusion_blocks
    from edgetrain.optim import warm_up_kernels
    from edgetrain.plan import ACTIVATIONS, largest_micro_batch
    from edgetrain.resident import Resident
    from edgetrain.spec import ModelSpec, TextModelSpec
    from edgetrain.stages import largest_block, stages_of_block
    from edgetrain.training_data import training_batches

    model, tokens = spec.model, spec.tokens_per_example
    assert isinstance(model, (ModelSpec, TextModelSpec))
    data = _noise(spec)
    small = math.ceil(_SMALLEST_TENSOR_BYTES / (4 * model.width * tokens))
    # Another phase of the step has the peak once activations outgrow the gradient of a weight: measured beyond that.
    large = max(small, math.ceil(1.2 * model.width / tokens))
    most = min(2 * large, largest_micro_batch(spec))
    micro_batches = sorted({min(one, most) for one in (1, small, 2 * small, large, 2 * large)})
    family = build_family(spec)
    with tempfile.TemporaryDirectory() as scratch:
        device = devices.open_device(device_kind, Path(scratch))
        memory = device.memory
        meta = build_modules(spec, family, 0)
        kinds = dict(zip((stage.kind for stage in stages_of_block(spec, 0)), meta.modules, strict=True))
        shapes = {kind: {n: list(p.shape) for n, p in module.named_parameters()} for kind, module in kinds.items()}
        # Every parameter's gradient is the same memory: their values do not matter here, their size does.
        largest = max(math.prod(shape) for tensors in shapes.values() for shape in tensors.values())
        overlaid = torch.zeros(largest, device=device.torch_device)
        step_bytes: dict[str, list[list[tuple[int, float]]]] = {kind: [] for kind in ACTIVATIONS}
        bounds: dict[str, list[tuple[int, float] | None]] = {kind: [] for kind in ACTIVATIONS}
        step_s: dict[str, list[list[tuple[int, float]]]] = {kind: [] for kind in ACTIVATIONS}
        own_bytes = 0
        for layers in (1, 2, 3):
            one = dataclasses.replace(
                spec,
                model=dataclasses.replace(model, depth=layers),
                diffusion_blocks=dataclasses.replace(spec.diffusion_blocks, num_blocks=1),
                train=dataclasses.replace(spec.train, batch_size=micro_batches[-1], micro_batch=0),
            )
            resident = Resident(device, [largest_block(one, shapes)], moments_resident=False)
            block = bind(resident, one, shapes, family, 0)
            for module in block.modules:
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.grad = overlaid[: parameter.numel()].view(parameter.shape)

            objective = diffusion_blocks(one, training_batches(one, data))
            tier = devices.Tier.DISK if device.capabilities.host_addressable else devices.Tier.HOST
            policies: dict[str, Activations] = {
                "keep": Keep(),
                "recompute": Recompute(),
                "offload": Offload(device, tier, resident.owns),
            }

            def run(
                policy: Activations, micro_batch: int, objective: Objective = objective, block: Block = block
            ) -> None:
                draw = {
                    k: torch.from_numpy(v).to(device.torch_device)
                    for k, v in objective.draw(0, 0, 0, micro_batch).items()
                }
                objective.loss(block, draw, policy).backward()

            def timed(policy: Activations, micro_batch: int, run: Callable[[Activations, int], None] = run) -> float:
                began = time.perf_counter()
                run(policy, micro_batch)
                device.synchronize()
                return time.perf_counter() - began

            warm_up_kernels(device)
            for kind, policy in policies.items():
                peaks, times = step_bytes[kind], step_s[kind]
                peaks.append([])
                times.append([])
                bounds[kind].append(None)
                for number, micro_batch in enumerate(micro_batches):
                    optional = layers > _ALWAYS_MEASURED or number >= _ALWAYS_MEASURED
                    before = memory.resident_bytes()
                    if optional:
                        memory.limit(budget_bytes)
                    try:
                        run(policy, micro_batch)
                        memory.reset_peak()
                        before = memory.resident_bytes()
                        seconds = [timed(policy, micro_batch)]
                        while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_S:
                            seconds.append(timed(policy, micro_batch))
                    except (RuntimeError, MemoryError) as error:
                        if not limits.is_out_of_memory(error):
                            raise
                        limits.return_freed_memory()
                        bounds[kind][-1] = (micro_batch, budget_bytes - before)
                        break
                    finally:
                        memory.lift()
                    times[-1].append((micro_batch, min(seconds)))
                    peak_bytes = memory.peak_bytes()
                    peaks[-1].append((micro_batch, peak_bytes - before))
                    own_bytes = own_bytes if optional else max(own_bytes, peak_bytes)
                if len(peaks[-1]) < min(_ALWAYS_MEASURED, len(micro_batches)):
                    del peaks[-1], times[-1]
        buffers_bytes = overlaid.nbytes + (resident.nbytes if memory.counts_untouched else 0)
        runtime_bytes = memory.resident_bytes() - buffers_bytes + memory.late_bytes
        heap = None
        whole = not any(any(rows) for rows in bounds.values())
        if memory.reuses_freed and len(step_bytes["keep"]) == layers:
            # Last: a heap that once was large stays so in part. Of what fitted last.
            (micro_batch, _), (_, plain_s) = step_bytes["keep"][-1][-1], step_s["keep"][-1][-1]
            heap_s = _from_heap(lambda: timed(policies["keep"], micro_batch), memory, budget_bytes)
            whole = whole and heap_s is not None
            heap = None if heap_s is None else min(1.0, heap_s / plain_s)
    return {
        "shapes": shapes,
        "budget_bytes": None if whole else budget_bytes,
        "own_bytes": own_bytes,
        "runtime_bytes": runtime_bytes,
        "step_bytes": {kind: {"points": step_bytes[kind], "bounds": bounds[kind]} for kind in ACTIVATIONS},
        "step_s": step_s,
        "heap": heap,
    }


def _from_heap(timed: Callable[[], float], memory: Memory, budget_bytes: int) -> float | None:
    """The seconds of a step if its memory comes from the heap; None where that does not fit."""
    try:
        memory.limit(budget_bytes)
        limits.keep_freed_memory(True)
        return min(timed() for _ in range(_REPEATS))
    except (RuntimeError, MemoryError) as error:
        if not limits.is_out_of_memory(error):
            raise
        return None
    finally:
        limits.keep_freed_memory(False)
        limits.return_freed_memory()
        memory.lift()
