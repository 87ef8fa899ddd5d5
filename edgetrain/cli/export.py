"""edgetrain export"""

from __future__ import annotations

from pathlib import Path

import click

from edgetrain.cli import options


@click.command("export")
@options.SESSION
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to.")
@click.option("--single-file", is_flag=True, help="One self-contained model.onnx, the chain unrolled.")
@options.BUDGET
@options.JSON
def command(session: Path, folder: Path, single_file: bool, budget: int | None, as_json: bool) -> None:
    """Export SESSION's model as ONNX and compare it with the trained one. Exit code 10: they differ; nothing is left.

    \b
    Example:
      edgetrain export my-session --to my-model
      edgetrain export my-session --to my-model --single-file
    """
    from edgetrain.cli.reference import referenced
    from edgetrain.session import Session
    from edgetrain.units import format_bytes
    from exporters import onnx, parity

    found = Session.open(session)
    budget = options.saved_budget(found, budget)
    onnx.check_replaceable(folder)
    reference = referenced(session, folder, single_file, budget)
    with onnx.stage(found, folder, single_file) as staged:
        rows = parity.check(session, staged.folder, reference, budget)
        export = staged.publish()
    value = {
        "session": str(session),
        "files": [str(path) for path in export.files],
        "emit_peak_bytes": export.emit_peak_bytes,
        "budget_bytes": budget,
        "parity": rows,
    }

    def text() -> str:
        return "\n".join([
            *(f"{path}  {format_bytes(path.stat().st_size)}" for path in export.files),
            *(f"{r['file']} {r['output']:18} differs by at most {r['max_abs']:.2e}, relative {r['max_rel']:.2e}"
              for r in rows),
            f"emitted within {format_bytes(export.emit_peak_bytes)}",
        ])  # fmt: skip

    options.emit(value, as_json, text)
