"""The process that computes the outputs of an export with torch, from the session, one stage in memory at a time."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from devices.meter import usage
from edgetrain.noise import euler_coefficients
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec, Spec, StackSpec, TextModelSpec
from edgetrain.stages import Stage, stages_of_block
from edgetrain.store import disk
from exporters import parity
from exporters.dit import STEPS

if TYPE_CHECKING:
    from torch import Tensor, nn

Floats = NDArray[np.float32]
Outputs = tuple[Floats, ...]


class Model:
    """The trained model, run stage by stage on several batches."""

    def __init__(self, session: Session) -> None:
        from edgetrain.models import build_family, build_network

        self._session = session
        whole = parity.is_whole_classifier(session.spec)
        self._network: Any = build_network(session.spec, None) if whole else build_family(session.spec)

    def block(
        self, block: int, images: Sequence[Floats], z: Sequence[Floats], sigma: Sequence[Floats]
    ) -> list[Outputs]:
        """(logits, denoised) of one block for each batch."""
        import torch
        import torch.nn.functional as F

        from edgetrain.models.codebook import enter, read_out

        spec = self._session.spec
        codebook, stem, *layers, head = stages_of_block(spec, block)
        with torch.inference_mode():
            images_, z_, sigma_ = ([torch.from_numpy(one) for one in batches] for batches in (images, z, sigma))
            rows = self._module(codebook)()

            def entered(module: nn.Module, *batch: Tensor) -> Any:
                return enter(spec, module, rows, *batch)

            def read(module: nn.Module, *batch: Any) -> Tensor:
                return read_out(spec, module, rows, *batch)

            boundaries = self._map(stem, entered, zip(images_, z_, sigma_, strict=True))
            for layer in layers:
                boundaries = self._map(layer, lambda module, boundary: module(boundary), zip(boundaries, strict=True))
            logits = self._map(head, read, zip(boundaries, z_, sigma_, strict=True))
            return [(one.numpy(), (F.softmax(one, dim=1) @ rows).numpy()) for one in logits]

    def images(self, block: int, z: Sequence[Floats], sigma: Sequence[Floats], labels: Sequence[Any]) -> list[Outputs]:
        """(denoised,) of one block of a generator, or of the whole, for each batch."""
        import torch

        from edgetrain.models.dit import denoised, enter

        spec = self._session.spec
        stem, *layers, head = stages_of_block(spec, block)
        with torch.inference_mode():
            z_, sigma_, labels_ = ([torch.from_numpy(one) for one in batches] for batches in (z, sigma, labels))
            boundaries = self._map(stem, partial(enter, spec), zip(z_, sigma_, labels_, strict=True))
            for layer in layers:
                boundaries = self._map(layer, lambda module, boundary: module(boundary), zip(boundaries, strict=True))
            made = self._map(head, lambda module, boundary: module(boundary), zip(boundaries, strict=True))
            return [
                (denoised(spec, output, noisy, level).numpy(),)
                for output, noisy, level in zip(made, z_, sigma_, strict=True)
            ]

    def generated(self, noise: Sequence[Floats], labels: Sequence[Any], guidance: Sequence[Any]) -> list[Outputs]:
        """(images,) of all of a generation, for each batch."""
        spec = self._session.spec
        schedule = replace(spec.diffusion_blocks.noise, num_blocks=spec.num_blocks)
        grid = [*schedule.grid(STEPS), (0.0, -1)]
        states = [np.float32(math.sqrt(1 + schedule.sigma_max**2)) * one for one in noise]
        nobody = [np.full_like(one, spec.image_model.num_classes) for one in labels]
        for (sigma, block), (following, _) in itertools.pairwise(grid):
            sigmas = [np.full(len(one), sigma, np.float32) for one in states]
            known, unknown = (self.images(block, states, sigmas, whose) for whose in (labels, nobody))
            a, b = (np.float32(one) for one in euler_coefficients(sigma, following))
            states = [
                a * z + b * (without + scale * (found - without))
                for z, (found,), (without,), scale in zip(states, known, unknown, guidance, strict=True)
            ]
        return [(one,) for one in states]

    def classes(self, images: Sequence[Floats]) -> list[Outputs]:
        """(logits,) of a classifier trained as a whole, for each batch."""
        import torch

        stem, *layers, head = stages_of_block(self._session.spec, 0)
        with torch.inference_mode():
            given = [(torch.from_numpy(one),) for one in images]
            boundaries = self._map(stem, lambda module, batch: module(batch), given)
            for layer in layers:
                boundaries = self._map(layer, lambda module, boundary: module(boundary), zip(boundaries, strict=True))
            logits = self._map(head, self._network.logits, zip(boundaries, strict=True))
            return [(one.numpy(),) for one in logits]

    def chain(self, images: Sequence[Floats], noise: Sequence[Floats]) -> list[Outputs]:
        """(logits, sigma_max_logits) of as many Euler steps as blocks, for each batch."""
        schedule = self._session.spec.diffusion_blocks.noise
        grid = schedule.grid(schedule.num_blocks)
        states = [np.float32(math.sqrt(1 + schedule.sigma_max**2)) * one for one in noise]
        readouts = []
        for step, (sigma, block) in enumerate(grid):
            sigmas = [np.full(len(one), sigma, np.float32) for one in images]
            outputs = self.block(block, images, states, sigmas)
            readouts.append([logits for logits, _ in outputs])
            a, b = euler_coefficients(sigma, grid[step + 1][0] if step + 1 < len(grid) else 0.0)
            states = [
                np.float32(a) * z + np.float32(b) * denoised for z, (_, denoised) in zip(states, outputs, strict=True)
            ]
        return list(zip(readouts[-1], readouts[0], strict=True))

    def _map(self, stage: Stage, run: Callable[..., Any], batches: Iterable[tuple[Any, ...]]) -> list[Any]:
        """``run(module, *batch)`` of each batch; the stage's module is gone before another is loaded."""
        module = self._module(stage)
        return [run(module, *batch) for batch in batches]

    def _module(self, stage: Stage) -> nn.Module:
        """The stage's module on its committed weights."""
        import torch

        layout, role = stage.layout(self._session.shapes), "weight" if stage.trained else "frozen"
        section = torch.empty(layout.section_bytes(role), dtype=torch.uint8)
        self._session.store.read(stage.name, role, section.numpy().data)
        tensors: dict[str, Tensor] = {}
        for tensor in layout.tensors:
            start = layout.offset(role, tensor.name)
            tensors[tensor.name] = section[start : start + tensor.nbytes].view(torch.float32).view(tensor.shape)
        with torch.device("meta"):
            module = self._build(stage)
        module.load_state_dict(tensors, assign=True)
        return module

    def _build(self, stage: Stage) -> nn.Module:
        from edgetrain.models.codebook import Codebook

        model = self._session.spec.image_model
        return Codebook(model.num_classes, model.width) if stage.kind == "codebook" else self._network.build(stage.kind)


def compute(
    session: Session, single_file: bool, descriptor: int, budget_bytes: int | None, graphs: Path | None = None
) -> parity.Reference:
    """Computes every case and leaves its outputs in the file ``descriptor``, one .npy after the other. Of a stack of
    somebody's own its graphs are made on the way, in the folder ``graphs``.

    Raises:
        BudgetBroken: the budget is too small to run the model.
        OSError: the file cannot be written.
    """
    digest, model = session.store.digest(), session.spec.model
    outputs = io.BytesIO()
    with parity.memory_errors(budget_bytes):
        if isinstance(model, StackSpec):
            assert graphs is not None
            _stack(session, graphs, outputs, budget_bytes)
        elif isinstance(model, LanguageModelSpec):
            _language(session, outputs, budget_bytes)
        elif isinstance(model, TextModelSpec):
            _text(session, single_file, outputs, budget_bytes)
        else:
            _images(session, single_file, outputs, budget_bytes)
        disk.write_fully(descriptor, outputs.getbuffer(), 0)
    parity.check_peak(usage().peak_bytes, budget_bytes)
    return parity.Reference(descriptor, digest, usage().peak_bytes)


def _images(session: Session, single_file: bool, outputs: io.BytesIO, budget_bytes: int | None) -> None:
    """Of a model of images, one stage in memory at a time."""
    _warm_up(session.spec)
    parity.limit_memory(budget_bytes)
    model = Model(session)
    by_block: dict[int, list[dict[str, Floats]]] = {}
    for block, _, inputs in parity.cases(session.spec, single_file):
        by_block.setdefault(block, []).append(inputs)
    for block, batches in by_block.items():
        given = {name: [inputs[name] for inputs in batches] for name in batches[0]}
        if parity.is_whole_classifier(session.spec):
            computed = model.classes(**given)
        elif session.spec.model.family == "dit":
            computed = model.generated(**given) if single_file else model.images(block, **given)
        else:
            computed = model.chain(**given) if single_file else model.block(block, **given)
        for arrays in computed:
            for array in arrays:
                np.save(outputs, array)


def _stack(session: Session, graphs: Path, outputs: io.BytesIO, budget_bytes: int | None) -> None:
    from exporters.stack import emit

    parity.limit_memory(budget_bytes)
    emit(session, graphs, outputs)


def _language(session: Session, outputs: io.BytesIO, budget_bytes: int | None) -> None:
    """The logits of a language model, one layer in memory at a time."""
    import devices
    from edgetrain.inference import LanguageModel, SessionWeights
    from edgetrain.models.attention import KeyValue

    model = LanguageModel(SessionWeights(session), devices.open_device("cpu"))
    model.warm_up()
    parity.limit_memory(budget_bytes)
    language = session.spec.language
    for tokens in parity.language_cases(session.spec):
        n, length = tokens.shape
        caches = [KeyValue(n, language.kv_heads, length, language.head_dim) for _ in range(language.depth)]
        np.save(outputs, model.logits(tokens, caches))
        for cache in caches:
            np.save(outputs, cache.keys.numpy())
            np.save(outputs, cache.values.numpy())


def _text(session: Session, single_file: bool, outputs: io.BytesIO, budget_bytes: int | None) -> None:
    """Of a language model that was trained from the beginning, one block in memory at a time."""
    import devices
    from edgetrain.text_sampling import TextModel

    model = TextModel(session, devices.open_device("cpu"), 1)
    model.warm_up()
    parity.limit_memory(budget_bytes)
    for block, _, inputs in parity.text_cases(session.spec, single_file):
        computed = model.outputs(block, inputs)
        for name in parity.text_outputs(session.spec, block, single_file):
            np.save(outputs, computed[name])


def _warm_up(spec: Spec) -> None:
    """Runs every operation once on a model of the same kind that is next to nothing, for the libraries' own pages."""
    import torch

    from edgetrain.models import build_family, build_network, dit
    from edgetrain.models.codebook import enter, read_out

    neighbours = min(spec.image_model.neighbours, 1)
    model = replace(
        spec.image_model, width=8, heads=2, patch=1, image_shape=(1, 2, 2), num_classes=2, neighbours=neighbours
    )
    small = replace(spec, model=model)
    family = build_family(small)
    with torch.inference_mode():
        z, sigma, images = torch.ones(2, 8), torch.ones(2), torch.ones(2, 1, 2, 2)
        if parity.is_whole_classifier(spec):
            network: Any = build_network(small, None)
            boundary = network.build("layer")(network.build("stem")(images))
            network.logits(network.build("head"), boundary)
        elif spec.model.family == "dit":
            boundary = dit.enter(small, family.build("stem"), images, sigma, torch.zeros(2, dtype=torch.int64))
            dit.denoised(small, family.build("head")(family.build("layer")(boundary)), images, sigma)
        else:
            rows = torch.ones(2, 8)
            boundary = enter(small, family.build("stem"), rows, images, z, sigma)
            read_out(small, family.build("head"), rows, family.build("layer")(boundary), z, sigma)
    with contextlib.suppress(RuntimeError):  # on purpose: the code of the error path takes pages too
        torch.empty(1 << 56, dtype=torch.uint8)
