"""Entry of the process of ``exporters.compare``: prepares the process before anything large is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from devices import limits
from devices.meter import usage
from edgetrain.errors import EdgetrainError
from edgetrain.store import disk


def main(request_text: str) -> None:
    """Compares as requested; prints the report, or the error, as a line of JSON."""
    limits.prepare_process(1)
    from exporters import compare, parity

    request = parity.Request.parse(request_text)
    try:
        with parity.memory_errors(request.budget_bytes):
            report = compare.run(request)
    except EdgetrainError as error:
        report = _told(error)
    except OSError as error:
        report = _told(disk.explain(error, Path(error.filename or request.export_path)))
    print(json.dumps({"peak_bytes": usage().peak_bytes, **report}))


def _told(error: EdgetrainError) -> dict[str, object]:
    return {"error": type(error).__name__, "message": error.message, "hint": error.hint}


if __name__ == "__main__":
    main(*sys.argv[1:])
