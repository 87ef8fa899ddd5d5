"""edgetrain doctor"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import click

from edgetrain.cli import options
from edgetrain.errors import ParityFailed, UsageError


@click.command("doctor")
@options.SESSION
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="Compare so many of the last.")
@options.DEVICE
@options.THREADS
@options.JSON
def command(session: Path, layers: int, device: str, threads: int, as_json: bool) -> None:
    """Check SESSION's gradients: streamed against everything in memory, on its own model and data.

    Takes the first micro-batch of the next step. Once the streaming trainer differentiates it, each layer from its
    boundary with recomputation; once ordinary PyTorch does, in one graph over the last layers and the head. Also
    checked: streaming it again gives equal bits, every gradient is finite, and no compiler was loaded. Nothing is
    changed. Exit code 10: some gradient is off by more than 1e-5 of its largest value.

    \b
    Example:
      edgetrain doctor my-session --layers 4
    """
    options.check_device(device)
    from edgetrain.session import Session
    from edgetrain.units import format_bytes

    found = Session.open(session)
    if not found.spec.is_exact:
        raise UsageError(
            f"{session} is trained by {found.spec.train.objective}, whose blocks are differentiated as a whole",
            "doctor is there for sessions of the exact objective.",
        )
    _, dataset = options.open_training_data(found.spec, found)
    scratch = Path(click.get_current_context().with_resource(options.temporary_folder()))
    options.start_torch(threads)
    from edgetrain.doctor import examine

    result = examine(found, dataset, device, scratch, layers)
    value = {
        "session": str(session), "ok": result.good, "tolerance": result.tolerance, "relative": _number(result.relative),
        "layers": result.layers, "micro_batch": result.micro_batch, "streamed_loss": _number(result.streamed_loss),
        "resident_loss": _number(result.resident_loss), "repeats": result.repeats,
        "compilers": list(result.compilers), "peak_bytes": result.peak_bytes,
        "tensors": [
            {key: _number(one) if isinstance(one, float) else one for key, one in dataclasses.asdict(row).items()}
            for row in result.rows
        ],
    }  # fmt: skip

    def text() -> str:
        equal = sum(row.bit_equal for row in result.rows)
        lines = [
            f"{row.stage:14} {row.tensor:32} "
            + ("bit-equal" if row.bit_equal else f"max abs {row.absolute:.2e}  max rel {row.relative:.2e}")
            + ("" if row.finite else "  NOT FINITE")
            for row in result.rows
        ]
        return "\n".join([
            *lines,
            f"loss {result.streamed_loss:.6f} streamed, {result.resident_loss:.6f} in memory",
            f"streamed twice: {'equal bits' if result.repeats else 'DIFFERENT BITS'}; compilers loaded: "
            f"{', '.join(result.compilers) or 'none'}; peak {format_bytes(result.peak_bytes)}",
            f"{'gradients are exact' if result.good else 'GRADIENTS DIFFER'}: {equal} of {len(result.rows)} tensors "
            f"bit-equal, the worst off by {result.relative:.1e} of its largest value ({result.tolerance:g} is allowed)",
        ])  # fmt: skip

    options.emit(value, as_json, text)
    if not result.good:
        sys.exit(ParityFailed.exit_code)


def _number(value: float) -> float | None:
    """JSON has no other numbers than finite ones."""
    return value if math.isfinite(value) else None
