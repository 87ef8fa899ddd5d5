"""Whether an export computes what the session's model does: torch in one process, onnxruntime in another.

One after the other, so that neither torch's memory nor onnxruntime's adds to the other's, each under what the
budget leaves beside this process. This module imports neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from devices import limits
from devices.meter import resident_bytes_fast, usage
from edgetrain import errors
from edgetrain.errors import BudgetBroken, ParityFailed
from edgetrain.randomness import Purpose, Stream, normal, uniform
from edgetrain.session import Session
from edgetrain.store.disk import replace_file
from edgetrain.units import format_bytes
from exporters.manifest import MODEL, Manifest, block_file

RTOL, ATOL = 1e-4, 1e-5
BATCH_SIZES = (2, 5)
PARITY = "parity.json"

_SEED = 0
_IMAGES, _SIGMA, _STATE = range(3)  # streams of their own, whatever evaluation draws


@dataclass(frozen=True)
class Request:
    """What both processes get to know: ``work_path`` is where the first one leaves its outputs for the second."""

    session_path: Path
    export_path: Path
    work_path: Path
    budget_bytes: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        fields = json.loads(text)
        budget_bytes = fields.pop("budget_bytes")
        return cls(**{name: Path(path) for name, path in fields.items()}, budget_bytes=budget_bytes)


def check(session_path: Path, export_path: Path, budget_bytes: int | None) -> list[dict[str, Any]]:
    """Compares every output of every model in ``export_path`` and writes parity.json beside them.

    Args:
        budget_bytes: what this process and the one that it waits for may have resident together.

    Returns:
        For each output: ``file``, ``output``, ``max_abs``, ``max_rel`` (where the reference is above ``atol``),
        ``rtol``, ``atol``, ``batch_sizes`` and ``passed``.

    Raises:
        ParityFailed: an output differs by more than ``atol + rtol * |reference|``, or is not finite.
        BudgetBroken: the budget is too small to run the model.
        SessionLocked: the session was trained on since it was exported.
    """
    session = Session.open(session_path)
    remaining = None if budget_bytes is None else budget_bytes - resident_bytes_fast()[0]
    # A few KiB, and not in the session, which may lie in a folder that can only be read.
    with tempfile.TemporaryDirectory(prefix="parity.") as work:
        request = Request(session_path.absolute(), export_path.absolute(), Path(work), remaining)
        reference, compared = _run("reference", request), _run("compare", request)
    rows: list[dict[str, Any]] = compared["rows"]
    peaks = {"reference": reference["peak_bytes"], "compare": compared["peak_bytes"]}
    report = {"digest": session.store.digest(), "outputs": rows, "peak_bytes": peaks}
    replace_file(export_path / PARITY, json.dumps(report, indent=1).encode())
    failed = [row for row in rows if not row["passed"]]
    if failed:
        worst = max(failed, key=lambda row: row["max_abs"] if row["max_abs"] is not None else np.inf)
        raise ParityFailed(
            f"{worst['output']} of {worst['file']} differs from the trained model by {worst['max_abs']} "
            f"(relative {worst['max_rel']}); allowed are {ATOL} + {RTOL} * |value|",
            "Nothing was exported. `edgetrain verify` tells whether the session is damaged.",
        )
    return rows


def _run(module: str, request: Request) -> dict[str, Any]:
    """What ``exporters.MODULE`` reports, run by ``exporters.child``; its error becomes one of this process."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "exporters.child", module, json.dumps(asdict(request), default=str)],
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ParityFailed(
            f"the process of exporters.{module} ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        ) from None
    if "error" in report:
        raise getattr(errors, report["error"])(report["message"], report["hint"])
    if request.budget_bytes is not None and report["peak_bytes"] > request.budget_bytes:
        raise BudgetBroken(
            f"comparing took {format_bytes(report['peak_bytes'])}, "
            f"more than the {format_bytes(request.budget_bytes)} that the budget leaves for it",
            "Give a larger budget.",
        )
    return report


def limit_memory(request: Request, mapped_bytes: int = 0) -> None:
    """Keeps this process within the budget from now on. Call after imports and a warm-up.

    Args:
        mapped_bytes: weights that onnxruntime is going to map from a file, privately and writable, and twice: the
            limit counts both mappings, though their pages stay the file's and are resident once.

    Raises:
        BudgetBroken: it is beyond it already.
    """
    if request.budget_bytes is None or not limits.supported():
        return
    now = usage()
    limit = limits.data_limit_for(request.budget_bytes - mapped_bytes, now)
    if limit < now.data_bytes:
        raise BudgetBroken(
            f"comparing needs more than the {format_bytes(request.budget_bytes)} that the budget leaves for it: "
            f"{format_bytes(now.resident_bytes + mapped_bytes)} without room to compute in",
            "Give a larger budget.",
        )
    limits.set_data_limit(limit + 2 * mapped_bytes)


def cases(manifest: Manifest) -> Iterator[tuple[str, int, dict[str, NDArray[np.float32]]]]:
    """(file, batch size, inputs by name) of everything that is compared; ``sigma`` as a block meets it."""
    schedule, width = manifest.schedule, manifest.width
    files = [MODEL] if manifest.single_file else [block_file(block) for block in range(schedule.num_blocks)]
    for block, file in enumerate(files):
        for count in BATCH_SIZES:
            images = uniform(_stream(_IMAGES, block), 0, count, int(np.prod(manifest.image_shape))) * 2 - 1
            unit = normal(_stream(_STATE, block), 0, count, width)
            inputs = {"images": images.astype(np.float32).reshape(count, *manifest.image_shape)}
            if manifest.single_file:
                inputs["noise"] = unit
            else:
                uniforms = uniform(_stream(_SIGMA, block), 0, count)[:, 0]
                sigma = np.array(schedule.draw(block, uniforms.tolist()), np.float32)
                inputs |= {"z": np.sqrt(1 + sigma[:, None] ** 2) * unit, "sigma": sigma}
            yield file, count, inputs


def _stream(what: int, block: int) -> Stream:
    return Stream(_SEED, Purpose.EVALUATION_NOISE, 1 + what, block)


def reference_path(work: Path, file: str, count: int, output: str) -> Path:
    """Where the reference of one output is, as .npy."""
    return work / f"{file}.{count}.{output}.npy"


OUTPUTS: Mapping[bool, tuple[str, str]] = {False: ("logits", "denoised"), True: ("logits", "sigma_max_logits")}
"""The names of the outputs, by whether the export is a single file."""
