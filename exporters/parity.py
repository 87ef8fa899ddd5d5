"""Whether an export computes what the session's model does: torch in one process, onnxruntime in another.

One after the other, so that neither torch's memory nor onnxruntime's adds to the other's. Torch needs nearly all of a
small budget: it comes first, in a process that nothing waits for (``exporters.reference``). Onnxruntime gets what the
budget leaves beside this process. This module imports neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from devices import limits
from devices.meter import resident_bytes_fast, usage
from edgetrain import errors
from edgetrain.errors import BudgetBroken, ParityFailed, SessionLocked
from edgetrain.noise import masking_band
from edgetrain.randomness import Purpose, Stream, normal, uniform
from edgetrain.spec import Spec
from edgetrain.store.disk import replace_file
from edgetrain.units import format_bytes
from exporters.graph import Storage
from exporters.manifest import LanguageManifest, TextManifest, read

RTOL, ATOL = 1e-4, 1e-5
_ALLOWED = {"fp16": 0.02, "int8": 0.15}
"""Of matrices that are stored coarsely: by how much of its largest element an output may differ. A wrong graph differs
by about all of it; what the storage costs on real data is for ``evaluate`` to say."""
BATCH_SIZES = (2, 5)
LANGUAGE_SHAPES = ((1, 7), (3, 12))
"""(batch size, tokens)."""
PARITY = "parity.json"

_SEED = 0
_ROOM_MIB = 32
_IMAGES, _SIGMA, _STATE, _TOKENS, _ROW = range(5)  # streams of their own, whatever evaluation draws


@dataclass(frozen=True)
class Reference:
    """What torch computed. ``descriptor``: of the file with the outputs of all ``cases``, in their order."""

    descriptor: int
    digest: str
    peak_bytes: int


@dataclass(frozen=True)
class Request:
    """What the process with onnxruntime gets to know."""

    session_path: Path
    export_path: Path
    descriptor: int
    budget_bytes: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(Path(fields.pop("session_path")), Path(fields.pop("export_path")), **fields)


def check(
    session_path: Path, export_path: Path, reference: Reference, budget_bytes: int | None
) -> list[dict[str, Any]]:
    """Compares every output of every model in ``export_path`` and writes parity.json beside them.

    Args:
        budget_bytes: what this process and the one that it waits for may have resident together.

    Returns:
        For each output: ``file``, ``output``, ``max_abs``, ``max_rel`` (where the reference is above ``atol``),
        ``rtol``, ``atol``, ``batch_sizes``, ``dtype`` and ``passed``.

    Raises:
        ParityFailed: an output differs by more than ``atol + rtol * |reference|``, or is not finite.
        BudgetBroken: the budget is too small to run the model.
        SessionLocked: the session was trained on while it was exported.
    """
    made = read(export_path)
    digest = made.digest
    if digest != reference.digest:
        raise SessionLocked(f"{session_path} was trained on while it was exported", "Export it again.")
    remaining = None if budget_bytes is None else budget_bytes - resident_bytes_fast()[0]
    compared = _compare(Request(session_path.absolute(), export_path.absolute(), reference.descriptor, remaining))
    rows: list[dict[str, Any]] = compared["rows"]
    peaks = {"reference": reference.peak_bytes, "compare": compared["peak_bytes"]}
    report: dict[str, Any] = {"digest": digest, "storage": made.storage, "outputs": rows, "peak_bytes": peaks}
    if isinstance(made, (LanguageManifest, TextManifest)):
        report["lengths"] = [length for _, length in LANGUAGE_SHAPES]
    replace_file(export_path / PARITY, json.dumps(report, indent=1).encode())
    failed = [row for row in rows if not row["passed"]]
    if failed:
        worst = max(failed, key=lambda row: row["max_abs"] if row["max_abs"] is not None else np.inf)
        raise ParityFailed(
            f"{worst['output']} of {worst['file']} differs from the trained model by {worst['max_abs']} "
            f"(relative {worst['max_rel']}); allowed are {worst['atol']:.2g} + {worst['rtol']} * |value|",
            "Nothing was exported. `edgetrain verify` tells whether the session is damaged.",
        )
    return rows


def _compare(request: Request) -> dict[str, Any]:
    """What ``exporters.compare`` reports, run by ``exporters.child``; its error becomes one of this process."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "exporters.child", json.dumps(asdict(request), default=str)],
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        pass_fds=[request.descriptor],
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ParityFailed(f"the comparison ended with {done.returncode}: {done.stderr.strip()[-2000:]}") from None
    if "error" in report:
        raise getattr(errors, report["error"])(report["message"], report["hint"])
    check_peak(report["peak_bytes"], request.budget_bytes)
    return report


def tolerance(storage: Storage, reference: NDArray[np.float32], of_largest: bool) -> tuple[float, float]:
    """(rtol, atol) for an output. ``of_largest``: near zero it has the rounding of its large neighbours, as logits of a
    text have."""
    largest = float(np.abs(reference).max())
    if storage in _ALLOWED:
        return 0.0, _ALLOWED[storage] * largest
    return RTOL, ATOL * max(1.0, largest) if of_largest else ATOL


def check_peak(peak_bytes: int, budget_bytes: int | None) -> None:
    """Raises BudgetBroken if the process took more than it may."""
    if budget_bytes is not None and peak_bytes > budget_bytes:
        raise BudgetBroken(
            f"comparing took {format_bytes(peak_bytes)}, "
            f"more than the {format_bytes(budget_bytes)} that the budget leaves for it",
            "Give a larger budget.",
        )


@contextmanager
def memory_errors(budget_bytes: int | None) -> Iterator[None]:
    """Lifts the limit and raises BudgetBroken where memory runs out inside."""
    try:
        yield
    except Exception as error:
        if not limits.is_out_of_memory(error):
            raise
        limits.lift_data_limit()
        raise BudgetBroken(
            "comparing the export with the model takes more than the "
            f"{format_bytes(budget_bytes or 0)} that the budget leaves for it",
            "Give a larger budget. One graph for each block needs less than a single file.",
        ) from error


def limit_memory(budget_bytes: int | None, mapped_bytes: int = 0, touched_bytes: int | None = None) -> None:
    """Keeps this process within the budget from now on. Call after imports and a warm-up.

    Args:
        mapped_bytes: weights that onnxruntime is going to map from a file, privately and writable, and twice: the
            limit counts both mappings, though their pages stay the file's and are resident once.
        touched_bytes: how many of them are going to be resident; None: all.

    Raises:
        BudgetBroken: it is beyond it already.
    """
    if budget_bytes is None or not limits.supported():
        return
    now = usage()
    touched_bytes = mapped_bytes if touched_bytes is None else touched_bytes
    limit = limits.data_limit_for(budget_bytes - touched_bytes, now)
    if limit < now.data_bytes:
        raise BudgetBroken(
            f"comparing needs more than the {format_bytes(budget_bytes)} that the budget leaves for it: "
            f"{format_bytes(now.resident_bytes + touched_bytes)} without room to compute in",
            f"Name a larger one, --memory-budget {(now.resident_bytes + touched_bytes >> 20) + _ROOM_MIB}MiB or more.",
        )
    limits.set_data_limit(limit + 2 * mapped_bytes)


def read_all(descriptor: int) -> bytes:
    """The whole file, from its start wherever its position is."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def is_whole_classifier(spec: Spec) -> bool:
    return spec.model.family == "vit" and spec.is_exact


def cases(spec: Spec, single_file: bool) -> Iterator[tuple[int, int, dict[str, NDArray[Any]]]]:
    """(block, batch size, inputs by name) of everything that is compared; ``sigma`` as a block meets it. A single file
    is that of block 0."""
    schedule = replace(spec.diffusion_blocks.noise, num_blocks=spec.num_blocks)
    width, image_shape, num_classes = spec.image_model.width, spec.image_model.image_shape, spec.image_model.num_classes
    for block in range(1 if single_file else spec.num_blocks):
        for count in BATCH_SIZES:
            images = uniform(_stream(_IMAGES, block), 0, count, int(np.prod(image_shape))) * 2 - 1
            unit = normal(_stream(_STATE, block), 0, count, width)
            inputs: dict[str, NDArray[Any]] = {"images": images.astype(np.float32).reshape(count, *image_shape)}
            if is_whole_classifier(spec):
                pass  # noise is for the others
            elif single_file and spec.model.family == "dit":
                eps = normal(_stream(_STATE, block), 0, count, int(np.prod(image_shape))).reshape(count, *image_shape)
                inputs = {"noise": eps, "labels": np.arange(count) % (num_classes + 1),
                          "guidance": np.array(2.0, np.float32)}  # fmt: skip
            elif single_file:
                inputs["noise"] = unit
            elif spec.model.family == "dit":
                uniforms = uniform(_stream(_SIGMA, block), 0, count)[:, 0]
                sigma = np.array(schedule.draw(block, uniforms.tolist()), np.float32)
                eps = normal(_stream(_STATE, block), 0, count, int(np.prod(image_shape))).reshape(count, *image_shape)
                z = inputs.pop("images") + sigma[:, None, None, None] * eps
                labels = np.arange(block, block + count) % (num_classes + 1)  # that of no class too, in time
                inputs |= {"z": z, "sigma": sigma, "labels": labels}
            else:
                uniforms = uniform(_stream(_SIGMA, block), 0, count)[:, 0]
                sigma = np.array(schedule.draw(block, uniforms.tolist()), np.float32)
                row = normal(_stream(_ROW, block), 0, count, width)
                row /= np.linalg.norm(row, axis=1, keepdims=True)
                inputs |= {"z": row + sigma[:, None] * unit, "sigma": sigma}
            yield block, count, inputs


def _stream(what: int, block: int) -> Stream:
    return Stream(_SEED, Purpose.EVALUATION_NOISE, 1 + what, block)


def language_cases(spec: Spec) -> Iterator[NDArray[np.int64]]:
    """Tokens (n, length) of everything that is compared of a language model."""
    model = spec.language
    for number, (count, length) in enumerate(LANGUAGE_SHAPES):
        some = min(length, model.max_length)
        draws = uniform(_stream(_TOKENS, number), 0, count, some)
        yield (draws * model.vocab_size).astype(np.int64)


def text_cases(spec: Spec, single_file: bool) -> Iterator[tuple[int, int, dict[str, NDArray[Any]]]]:
    """(block, number of the graph, inputs by name) of everything that is compared of a language model that was trained
    from the beginning. A single graph of next tokens is that of block 0 at sigma_max and z = 0."""
    model, schedule = spec.text_model, replace(spec.diffusion_blocks.noise, num_blocks=spec.num_blocks)
    is_at_sigma_max = single_file and not spec.is_exact and model.family != "masked"
    for block in range(1 if spec.is_exact or is_at_sigma_max else spec.num_blocks):
        for number, shape in enumerate(LANGUAGE_SHAPES):
            case = len(LANGUAGE_SHAPES) * block + number
            draws = uniform(_stream(_TOKENS, case), 0, *shape)
            inputs: dict[str, NDArray[Any]] = {"input_ids": (draws * model.vocab_size).astype(np.int64)}
            uniforms = uniform(_stream(_SIGMA, case), 0, shape[0])[:, 0]
            eps = normal(_stream(_STATE, case), 0, shape[0], shape[1] * model.width).reshape(*shape, model.width)
            if model.family == "masked":
                low, high = masking_band(spec.num_blocks, block)
                t = low + (high - low) * (uniforms[:1] if single_file else uniforms).repeat(
                    shape[0] if single_file else 1
                )
                is_masked = uniform(_stream(_IMAGES, case), 0, *shape) < t[:, None]
                inputs["input_ids"] = np.where(is_masked, model.vocab_size, inputs["input_ids"])
                inputs["t"] = t.astype(np.float32)
            elif spec.is_exact:
                inputs |= {"state": eps} if model.family == "recurrent" else {}
            elif is_at_sigma_max:
                sigma = np.full(shape[0], schedule.sigma_max, np.float32)
                inputs |= {"z": np.zeros_like(eps), "sigma": sigma}
            else:
                sigma = np.array(schedule.draw(block, uniforms.tolist()), np.float32)
                row = normal(_stream(_ROW, case), 0, shape[0], shape[1] * model.width).reshape(eps.shape)
                row /= np.linalg.norm(row, axis=-1, keepdims=True)
                inputs |= {"z": row + sigma[:, None, None] * eps, "sigma": sigma}
            yield block, 0 if single_file else block, inputs


def text_outputs(spec: Spec, block: int, single_file: bool) -> tuple[str, ...]:
    """The names of what is compared of a block of it."""
    denoises = not (single_file or spec.is_exact or spec.model.family == "masked")
    layers = len(spec.layers_of(block)) if spec.model.family == "ar" else 0
    presents = [f"present.{number}.{name}" for number in range(layers) for name in ("key", "value")]
    return ("logits", *(["denoised"] if denoises else []), *presents)


def outputs(spec: Spec, single_file: bool) -> tuple[str, ...]:
    """The names of what is compared."""
    if is_whole_classifier(spec):
        return ("logits",)
    if spec.model.family == "dit":
        return ("images",) if single_file else ("denoised",)
    return ("logits", "sigma_max_logits") if single_file else ("logits", "denoised")
