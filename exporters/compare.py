"""The process that runs an export with onnxruntime and compares its outputs with what torch left. No torch here."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec
from edgetrain.stages import exact_stages, largest_block
from exporters import parity
from exporters.language_runtime import LanguageRunner
from exporters.manifest import Manifest
from exporters.runtime import import_onnxruntime, open_model

Floats = NDArray[np.float32]


def run(request: parity.Request) -> dict[str, Any]:
    """The rows that ``parity.check`` returns."""
    session = Session.open(request.session_path)
    if isinstance(session.spec.model, LanguageModelSpec):
        return {"rows": _language_rows(request, session)}
    manifest = Manifest.read(request.export_path)
    layouts = [] if manifest.single_file else largest_block(session.spec, session.shapes)
    import_onnxruntime()
    parity.limit_memory(request.budget_bytes, sum(layout.section_bytes(layout.roles[0].name) for layout in layouts))
    names = parity.outputs(session.spec, manifest.single_file)
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    opened, model = "", None
    for file, count, inputs in parity.cases(session.spec, manifest.single_file):
        if opened != file:
            model = None  # before the next one is loaded
            opened, model = file, open_model(request.export_path / file, 1)
        assert model is not None
        for name, array in zip(names, model.run(list(names), inputs), strict=True):
            reference = np.load(references, allow_pickle=False)
            row = difference(array, reference) | {"rtol": parity.RTOL, "atol": parity.ATOL, "batch_sizes": [count]}
            key = (file, name)
            rows[key] = _worse(rows[key], row) if key in rows else {"file": file, "output": name, **row}
    return {"rows": list(rows.values())}


def _language_rows(request: parity.Request, session: Session) -> list[dict[str, Any]]:
    """Texts read at once, and in two parts, so that keys and values are compared by what they are for."""
    import_onnxruntime()
    runner = LanguageRunner(request.export_path, keeps=False)
    layouts = [session.layout(stage) for unit in exact_stages(session.spec).units for stage in unit.stages]
    largest = max(layout.section_bytes(layout.roles[0].name) for layout in layouts)
    # A graph at a time: of the embedding, which is mapped as a whole, some rows are read.
    touched = None if runner.manifest.single_file else 2 * largest
    parity.limit_memory(request.budget_bytes, runner.weights_bytes, touched)
    references = io.BytesIO(parity.read_all(request.descriptor))
    rows: dict[str, dict[str, Any]] = {}
    file = "model.onnx" if runner.manifest.single_file else "all graphs"
    for tokens in parity.language_cases(session.spec):
        reference, half = np.load(references, allow_pickle=False), tokens.shape[1] // 2
        whole, _ = runner.run(tokens, runner.empty(len(tokens)))
        first, past = runner.run(tokens[:, :half], runner.empty(len(tokens)))
        second, _ = runner.run(tokens[:, half:], past)
        for name, array in (("logits", whole), ("logits, by parts", np.concatenate([first, second], 1))):
            # Near zero a logit has the rounding of its large neighbours.
            atol = parity.ATOL * max(1.0, float(np.abs(reference).max()))
            row = difference(array, reference, atol)
            row |= {"rtol": parity.RTOL, "atol": atol, "batch_sizes": [len(tokens)]}
            rows[name] = _worse(rows[name], row) if name in rows else {"file": file, "output": name, **row}
    return list(rows.values())


def difference(array: Floats, reference: Floats, atol: float = parity.ATOL) -> dict[str, Any]:
    """``max_abs``, ``max_rel`` and ``passed``; the differences are None where something is not finite.

    A relative difference is taken where the reference is above ``atol``: below, it says nothing.
    """
    if array.shape != reference.shape or not (np.isfinite(array).all() and np.isfinite(reference).all()):
        return {"max_abs": None, "max_rel": None, "passed": False}
    size = np.abs(reference).astype(np.float64)
    off = np.abs(array.astype(np.float64) - reference)
    relative = off / np.where(size > atol, size, np.inf)
    passed = bool((off <= atol + parity.RTOL * size).all())
    return {"max_abs": float(off.max()), "max_rel": float(relative.max()), "passed": passed}


def _worse(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two rows of one output in one."""
    merged = {**one, "batch_sizes": one["batch_sizes"] + other["batch_sizes"]}
    for key in ("max_abs", "max_rel", "atol"):
        values = (one[key], other[key])
        merged[key] = None if None in values else max(values)
    merged["passed"] = one["passed"] and other["passed"]
    return merged
