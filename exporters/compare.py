"""The process that runs an export with onnxruntime and compares its outputs with what torch left. No torch here."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.session import Session
from edgetrain.stages import largest_block
from exporters import parity
from exporters.manifest import Manifest
from exporters.runtime import import_onnxruntime, open_model

Floats = NDArray[np.float32]


def run(request: parity.Request) -> dict[str, Any]:
    """The rows that ``parity.check`` returns."""
    manifest = Manifest.read(request.export_path)
    session = Session.open(request.session_path)
    layouts = [] if manifest.single_file else largest_block(session.spec, session.shapes)
    import_onnxruntime()
    parity.limit_memory(request.budget_bytes, sum(layout.section_bytes(layout.roles[0].name) for layout in layouts))
    names = parity.OUTPUTS[manifest.single_file]
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


def difference(array: Floats, reference: Floats) -> dict[str, Any]:
    """``max_abs``, ``max_rel`` and ``passed``; the differences are None where something is not finite.

    A relative difference is taken where the reference is above ``ATOL``: below, it says nothing.
    """
    if array.shape != reference.shape or not (np.isfinite(array).all() and np.isfinite(reference).all()):
        return {"max_abs": None, "max_rel": None, "passed": False}
    size = np.abs(reference).astype(np.float64)
    off = np.abs(array.astype(np.float64) - reference)
    relative = off / np.where(size > parity.ATOL, size, np.inf)
    passed = bool((off <= parity.ATOL + parity.RTOL * size).all())
    return {"max_abs": float(off.max()), "max_rel": float(relative.max()), "passed": passed}


def _worse(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two rows of one output in one."""
    merged = {**one, "batch_sizes": one["batch_sizes"] + other["batch_sizes"]}
    for key in ("max_abs", "max_rel"):
        values = (one[key], other[key])
        merged[key] = None if None in values else max(values)
    merged["passed"] = one["passed"] and other["passed"]
    return merged
