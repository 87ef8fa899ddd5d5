"""edgetrain export"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetrain.cli import options
from edgetrain.errors import BudgetBroken, UsageError

if TYPE_CHECKING:
    from edgetrain.session import Session
    from edgetrain.spec import Spec
    from exporters.graph import Storage
    from exporters.hf_session import Export
    from exporters.onnx import StagedExport

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_HF_NEEDED_BYTES = 8 << 20


@click.command("export")
@options.SESSION
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "hf", "ort-training"]),
    help="onnx; hf, of a pretrained language model: a folder for transformers, or of an adapter one for peft; "
    "ort-training, of a model in blocks: what onnxruntime's training API takes.  [onnx]",
)
@click.option("--single-file", is_flag=True, help="onnx: one model.onnx; of a classifier in blocks the whole chain.")
@click.option("--int8", is_flag=True, help="onnx: 8-bit matrices in layers, a scale for each output channel.")
@click.option("--fp16", is_flag=True, help="onnx: 16-bit matrices and tables, for GPUs.")
@click.option("--merge", is_flag=True, help="Add a LoRA adapter to the weights; of hf the whole model.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="hf: the type of the weights.  [as imported]")
@options.BUDGET
@options.JSON
def command(
    session: Path,
    folder: Path,
    kind: str | None,
    single_file: bool,
    int8: bool,
    fp16: bool,
    merge: bool,
    dtype: str | None,
    budget: int | None,
    as_json: bool,
) -> None:
    """Export SESSION's model: as ONNX, compared with the trained one (exit code 10: they differ; nothing is left), or
    for transformers and peft.

    \b
    Example:
      edgetrain export my-session --to my-model
      edgetrain export my-session --to my-model --single-file
      edgetrain export my-session --to my-model --int8
      edgetrain export my-session --to my-model --format hf --dtype bf16
      edgetrain export my-session --to my-model --format ort-training
    """
    from devices.limits import prepare_process

    prepare_process(1)  # before numpy comes
    from edgetrain.session import Session

    found = Session.open(session)
    kind = _checked_format(found.spec, kind)
    if int8 and fp16:
        raise UsageError("weights are stored in one way", "Choose --int8 or --fp16.")
    storage: Storage = "int8" if int8 else "fp16" if fp16 else "fp32"
    given = {"--single-file": single_file, "--int8": int8, "--fp16": fp16, "--dtype": dtype, "--merge": merge}
    unfit = {"onnx": ["--dtype"], "hf": ["--single-file", "--int8", "--fp16"], "ort-training": list(given)}
    for option in unfit[kind]:
        if given[option]:
            raise UsageError(f"{option} is no option of --format {kind}", "See edgetrain export --help.")
    if kind == "hf":
        _export_hf(found, folder, merge, dtype, budget, as_json)
        return
    from edgetrain.cli.reference import graphs_of
    from edgetrain.spec import StackSpec
    from exporters import onnx

    if isinstance(found.spec.model, StackSpec):
        if single_file or int8 or fp16 or merge:
            raise UsageError(
                "a model of your own leaves as a graph for each part, in float32", "Leave the options out."
            )
        staged: Any = partial(onnx.stage_stack, found, folder, graphs_of(folder))
    elif kind == "onnx":
        onnx.check_mergeable(found, merge)
        staged = partial(onnx.stage, found, folder, single_file, storage, merge)
    else:
        from exporters import ort_training

        ort_training.check(found.spec)
        staged = partial(onnx.stage_artifacts, found, folder, options.saved_budget(found, budget))
    _export_compared(found, session, folder, single_file, staged, budget, as_json)


def _checked_format(spec: Spec, kind: str | None) -> str:
    """The format of the export; UsageError if the model has none, or not that one."""
    from edgetrain.spec import LanguageModelSpec, StackSpec

    if isinstance(spec.model, StackSpec) and kind in ("hf", "ort-training"):
        raise UsageError(f"a model of your own has no export of the format {kind}", "Use --format onnx.")
    if kind == "hf" and not isinstance(spec.model, LanguageModelSpec):
        raise UsageError(
            f"hf is a format of pretrained language models, and the session has a model of the family "
            f"{spec.model.family!r}",
            "Use --format onnx.",
        )
    return kind or "onnx"


def _export_compared(
    found: Session,
    session: Path,
    folder: Path,
    single_file: bool,
    stage: Callable[[], AbstractContextManager[StagedExport]],
    budget: int | None,
    as_json: bool,
) -> None:
    """Makes what ``stage`` does, compares it with the trained model, and puts it in place."""
    from edgetrain.cli.reference import referenced
    from edgetrain.units import format_bytes
    from exporters import onnx, parity
    from exporters.manifest import read

    budget = _known_budget(found, budget)
    options.warn_of_untrained(found)
    onnx.check_replaceable(folder)
    reference = referenced(session, folder, single_file, budget)
    onnx.warm_up()
    with stage() as staged:
        if budget is not None and staged.emit_peak_bytes > budget:
            raise BudgetBroken(
                f"exporting took {format_bytes(staged.emit_peak_bytes)}, over the budget of {format_bytes(budget)}",
                "Give a larger budget; nothing was exported.",
            )
        rows = parity.check(session, staged.folder, reference, budget)
        storage = read(staged.folder).storage
        export = staged.publish()
    value = {
        "session": str(session),
        "files": [str(path) for path in export.files],
        "emit_peak_bytes": export.emit_peak_bytes,
        "budget_bytes": budget,
        "storage": storage,
        "parity": rows,
    }

    def text() -> str:
        presents = [row for row in rows if row["output"].startswith("present.")]
        several = (
            f"{len(presents)} keys and values differ by at most {max((r['max_abs'] for r in presents), default=0):.2e}"
        )
        return "\n".join([
            *(f"{path}  {format_bytes(path.stat().st_size)}" for path in export.files),
            *(f"{r['file']} {r['output']:18} differs by at most {r['max_abs']:.2e} (allowed {r['atol']:.1e} + "
              f"{r['rtol']:g} of it), relative {r['max_rel']:.2e}"
              for r in rows if r not in presents),
            *([several] if presents else []),
            f"emitted within {format_bytes(export.emit_peak_bytes)}",
        ])  # fmt: skip

    options.emit(value, as_json, text)


def _known_budget(found: Session, budget: int | None) -> int | None:
    """What is named now or was at the latest training; None of a session that was imported and not trained yet."""
    return None if budget is None and found.last_plan() is None else options.saved_budget(found, budget)


def _export_hf(found: Session, folder: Path, merge: bool, dtype: str | None, budget: int | None, as_json: bool) -> None:
    from devices.meter import usage
    from edgetrain.units import format_bytes

    export = _hf_within(found, folder, merge, dtype, budget)
    words = {stored: word for word, stored in _DTYPES.items()}
    value = {
        "session": str(found.path),
        "format": "hf",
        "files": [str(path) for path in export.files],
        "bytes": sum(path.stat().st_size for path in export.files),
        "peak_bytes": usage().peak_bytes,
        "dtype": words[export.dtype],
    }

    def text() -> str:
        return "\n".join([
            *(f"{path}  {format_bytes(path.stat().st_size)}" for path in export.files),
            f"{value['dtype']}, written within {format_bytes(usage().peak_bytes)}",
        ])  # fmt: skip

    options.emit(value, as_json, text)


def _hf_within(found: Session, folder: Path, merge: bool, dtype: str | None, budget: int | None) -> Export:
    """The export, inside the budget that is named now or was at the latest training, if there is one."""
    from edgetrain.governor import Governor
    from edgetrain.units import format_bytes
    from exporters import hf_session

    stored = _DTYPES[dtype] if dtype else None
    budget = _known_budget(found, budget)
    if budget is None:
        return hf_session.export(found, folder, dtype=stored, merge=merge)
    governor = Governor(budget)
    hf_session.warm_up()
    with governor.hold(_HF_NEEDED_BYTES):
        try:
            return hf_session.export(found, folder, dtype=stored, merge=merge, check=governor.check)
        except MemoryError as error:
            raise BudgetBroken(
                f"exporting needs more than {format_bytes(budget)} of memory", "Raise --memory-budget."
            ) from error
