"""The process that runs an export with onnxruntime and compares its outputs with what torch left. No torch here."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.noise import loss_weight
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec, Spec, TextModelSpec
from edgetrain.stages import exact_stages, largest_block
from exporters import parity
from exporters.graph import Storage
from exporters.language_runtime import LanguageRunner
from exporters.manifest import MODEL, Manifest, StackManifest, TrainingManifest, block_file, layer_file, read
from exporters.runtime import import_onnxruntime, open_model
from exporters.stack_runtime import StackRunner
from exporters.text_runtime import TextRunner

Floats = NDArray[np.float32]


def run(request: parity.Request) -> dict[str, Any]:
    """The rows that ``parity.check`` returns."""
    session, made = Session.open(request.session_path), read(request.export_path)
    if isinstance(made, TrainingManifest):
        return {"rows": _loss_rows(request, session)}
    if isinstance(made, StackManifest):
        return {"rows": _stack_rows(request, made)}
    if isinstance(session.spec.model, LanguageModelSpec):
        return {"rows": _language_rows(request, session)}
    if isinstance(session.spec.model, TextModelSpec):
        return {"rows": _text_rows(request, session)}
    manifest = Manifest.read(request.export_path)
    layouts = [] if manifest.single_file else largest_block(session.spec, session.shapes)
    import_onnxruntime()
    parity.limit_memory(request.budget_bytes, sum(layout.section_bytes(layout.roles[0].name) for layout in layouts))
    names = parity.outputs(session.spec, manifest.single_file)
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    opened, model = "", None
    for block, count, inputs in parity.cases(session.spec, manifest.single_file):
        file = MODEL if manifest.single_file else block_file(block)
        if opened != file:
            model = None  # before the next one is loaded
            opened, model = file, open_model(request.export_path / file, 1)
        assert model is not None
        for name, array in zip(names, model.run(list(names), inputs), strict=True):
            reference = np.load(references, allow_pickle=False)
            rtol, atol = parity.tolerance(manifest.storage, reference, False)
            row = difference(array, reference, atol, rtol) | {"rtol": rtol, "atol": atol}
            row |= {"batch_sizes": [count], "dtype": str(array.dtype)}
            key = (file, name)
            rows[key] = _worse(rows[key], row) if key in rows else {"file": file, "output": name, **row}
    return {"rows": list(rows.values())}


def _stack_rows(request: parity.Request, manifest: StackManifest) -> list[dict[str, Any]]:
    """The output of all parts, one after the other."""
    import_onnxruntime()
    runner = StackRunner(request.export_path)
    parity.limit_memory(request.budget_bytes)
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[str, dict[str, Any]] = {}
    for _ in parity.BATCH_SIZES:
        given, expected = (np.load(references, allow_pickle=False) for _ in range(2))
        _compared(rows, "all graphs", "output", runner.run(given), expected, manifest.storage)
    return list(rows.values())


def _loss_rows(request: parity.Request, session: Session) -> list[dict[str, Any]]:
    """The loss of each block as the training API computes it from the checkpoint, all of whose files it has loaded."""
    from exporters.ort_artifacts import Trained

    spec = session.spec
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[str, dict[str, Any]] = {}
    opened, trained = -1, None
    for block, names, inputs in _cases_of_loss(spec):
        if opened != block:
            trained = None  # before the next one is loaded
            opened, trained = block, Trained(request.export_path, block)
        outputs = {name: np.load(references, allow_pickle=False) for name in names}
        targets, expected = _loss_of(spec, inputs, outputs)
        assert trained is not None
        found = np.array([trained.loss(inputs | targets)], np.float32)
        count = len(next(iter(inputs.values())))
        _compared(rows, f"block{block:02d}.*", "loss", found, np.array([expected], np.float32), "fp32", count)
    return list(rows.values())


def _cases_of_loss(spec: Spec) -> Iterator[tuple[int, Sequence[str], dict[str, NDArray[Any]]]]:
    """(block, what torch left of it, inputs by name) of everything that is compared."""
    if isinstance(spec.model, TextModelSpec):
        for block, _, inputs in parity.text_cases(spec, False):
            yield block, parity.text_outputs(spec, block, False), inputs
    else:
        for block, _, inputs in parity.cases(spec, False):
            yield block, parity.outputs(spec, False), inputs


def _loss_of(
    spec: Spec, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, Floats]
) -> tuple[dict[str, NDArray[Any]], float]:
    """Some targets, by name, and the loss of what torch computed, in float64."""
    if spec.model.family == "dit":
        images = inputs["z"] / np.float32(2)
        weight = loss_weight(inputs["sigma"].astype(np.float64), spec.sigma_data)
        error = ((outputs["denoised"].astype(np.float64) - images) ** 2).mean((1, 2, 3))
        return {"images": images}, float((weight * error).sum() / spec.train.batch_size)
    logits = outputs["logits"].astype(np.float64)
    if isinstance(spec.model, TextModelSpec):
        targets = np.minimum(inputs["input_ids"], spec.model.vocab_size - 1)
        weights = np.full(targets.shape, 1 / targets.size, np.float32)
        given: dict[str, NDArray[Any]] = {"targets": targets, "weights": weights}
    else:
        targets = np.arange(len(logits)) % logits.shape[1]
        weights = np.full(targets.shape, 1 / spec.train.batch_size, np.float32)
        given = {"labels": targets}
    largest = logits.max(-1)
    nats = np.log(np.exp(logits - largest[..., None]).sum(-1)) + largest
    nats -= np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return given, float((nats * weights).sum())


def _language_rows(request: parity.Request, session: Session) -> list[dict[str, Any]]:
    """Texts read at once, and in two parts, so that keys and values are compared by what they are for."""
    import_onnxruntime()
    runner = LanguageRunner(request.export_path, budget_bytes=0)
    layouts = [session.layout(stage) for unit in exact_stages(session.spec).units for stage in unit.stages]
    largest = max(layout.section_bytes(layout.roles[0].name) for layout in layouts)
    # A graph at a time: of the embedding, which is mapped as a whole, some rows are read.
    touched = None if runner.manifest.single_file else 2 * largest
    parity.limit_memory(request.budget_bytes, runner.weights_bytes, touched)
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[str, dict[str, Any]] = {}
    is_single, storage = runner.manifest.single_file, runner.manifest.storage
    for tokens in parity.language_cases(session.spec):
        half = tokens.shape[1] // 2
        whole, presents = runner.run(tokens, runner.empty(len(tokens)))
        first, past = runner.run(tokens[:, :half], runner.empty(len(tokens)))
        second, presents_by_parts = runner.run(tokens[:, half:], past)
        reference = np.load(references, allow_pickle=False)
        for name, array in (("logits", whole), ("logits, by parts", np.concatenate([first, second], 1))):
            _compared(rows, MODEL if is_single else "all graphs", name, array, reference, storage)
        for layer, pairs in enumerate(zip(presents, presents_by_parts, strict=True)):
            file, prefix = (MODEL, f"present.{layer}") if is_single else (layer_file(layer), "present")
            for kind, *found in zip(("key", "value"), *pairs, strict=True):
                reference = np.load(references, allow_pickle=False)
                for how, array in zip(("", ", by parts"), found, strict=True):
                    _compared(rows, file, f"{prefix}.{kind}{how}", array, reference, storage)
    return list(rows.values())


def _text_rows(request: parity.Request, session: Session) -> list[dict[str, Any]]:
    """Block by block; what has keys and values at once, and in two parts."""
    import_onnxruntime()
    runner = TextRunner(request.export_path, budget_bytes=0)
    is_single, storage = runner.manifest.single_file, runner.manifest.storage
    layouts = largest_block(session.spec, session.shapes)
    block_bytes = sum(layout.section_bytes(layout.roles[0].name) for layout in layouts)
    parity.limit_memory(request.budget_bytes, runner.weights_bytes if is_single else block_bytes)
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[str, dict[str, Any]] = {}
    for block, number, inputs in parity.text_cases(session.spec, is_single):
        tokens = inputs.pop("input_ids")
        if is_single and "t" in inputs:
            inputs["t"] = inputs["t"][:1]
        if session.spec.is_exact and session.spec.model.family == "recurrent":
            inputs["loops"] = np.array(session.spec.text_model.loops)
        found = [("", _read(runner, number, tokens, inputs))]
        if runner.manifest.layers[number]:
            found.append((", by parts", _read(runner, number, tokens, inputs, tokens.shape[1] // 2)))
        for name in parity.text_outputs(session.spec, block, is_single):
            reference = np.load(references, allow_pickle=False)
            for how, outputs in found:
                _compared(rows, runner.manifest.graphs[number], name + how, outputs[name], reference, storage)
    return list(rows.values())


def _read(
    runner: TextRunner, number: int, tokens: NDArray[np.int64], more: dict[str, Any], cut: int = 0
) -> dict[str, Floats]:
    """The outputs of a graph; of one with keys and values for tokens before and after ``cut``, one after the other."""
    if not runner.manifest.layers[number]:
        return runner.run(number, {"input_ids": tokens, **more})
    past = runner.empty(number, len(tokens))
    parts: list[dict[str, Floats]] = []
    for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
        given = {name: array[:, part] if array.ndim > 1 else array for name, array in more.items()}
        outputs, past = runner.read(number, tokens[:, part], past, given)
        parts.append(outputs)
    # What is present is so of all tokens, those of the first part included.
    return {
        name: parts[-1][name] if name.startswith("present.") else np.concatenate([one[name] for one in parts], 1)
        for name in parts[0]
    }


def _compared(  # noqa: PLR0917
    rows: dict[str, dict[str, Any]],
    file: str,
    name: str,
    array: Floats,
    reference: Floats,
    storage: Storage,
    count: int | None = None,
) -> None:
    """Adds to ``rows`` how an output (n, ...), or one of ``count`` examples, differs, the worst of all cases."""
    rtol, atol = parity.tolerance(storage, reference, True)
    row = difference(array, reference, atol, rtol) | {"rtol": rtol, "atol": atol}
    row |= {"batch_sizes": [len(reference) if count is None else count], "dtype": str(array.dtype)}
    key = f"{file} {name}"
    rows[key] = _worse(rows[key], row) if key in rows else {"file": file, "output": name, **row}


def difference(
    array: Floats, reference: Floats, atol: float = parity.ATOL, rtol: float = parity.RTOL
) -> dict[str, Any]:
    """``max_abs``, ``max_rel`` and ``passed``; the differences are None where something is not finite.

    A relative difference is taken where the reference is above ``atol``: below, it says nothing.
    """
    if array.shape != reference.shape or not (np.isfinite(array).all() and np.isfinite(reference).all()):
        return {"max_abs": None, "max_rel": None, "passed": False}
    size = np.abs(reference).astype(np.float64)
    off = np.abs(array.astype(np.float64) - reference)
    relative = off / np.where(size > atol, size, np.inf)
    passed = bool((off <= atol + rtol * size).all())
    return {"max_abs": float(off.max()), "max_rel": float(relative.max()), "passed": passed}


def _worse(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two rows of one output in one."""
    merged = {**one, "batch_sizes": one["batch_sizes"] + other["batch_sizes"]}
    for key in ("max_abs", "max_rel", "atol"):
        values = (one[key], other[key])
        merged[key] = None if None in values else max(values)
    merged["passed"] = one["passed"] and other["passed"]
    return merged
