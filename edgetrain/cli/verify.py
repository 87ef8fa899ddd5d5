"""edgetrain verify"""

from __future__ import annotations

from pathlib import Path

import click

from edgetrain.cli import options
from edgetrain.errors import SessionCorrupt


@click.command("verify")
@options.SESSION
@options.JSON
def command(session: Path, as_json: bool) -> None:
    """Read and hash all of SESSION again and compare it with its manifests. Exit code 4: it is damaged.

    \b
    Example:
      edgetrain verify my-session
    """
    from edgetrain.session import Session

    found = Session.open(session)
    result = found.store.verify()
    problems = [f"{row.stage}: {problem}" for row in result.rows for problem in row.problems]
    if problems:
        raise SessionCorrupt(
            f"{session} is damaged in {len(problems)} places: " + "; ".join(problems[:5]),
            "Take the groups concerned from a copy of this session.",
        )
    value = {"session": str(session), "ok": True, "stages": len(result.rows), "digest": result.digest}
    options.emit(value, as_json, lambda: f"{session}: {len(result.rows)} stages are sound\ndigest  {result.digest}")
