"""Entry of the two processes of ``exporters.parity``: prepares the process before anything large is imported."""

from __future__ import annotations

import importlib
import json
import sys

from devices import limits
from devices.meter import usage
from edgetrain.errors import BudgetBroken, EdgetrainError
from edgetrain.units import format_bytes


def main(module: str, request_text: str) -> None:
    """Runs ``exporters.MODULE`` on the request; prints its report, or its error, as a line of JSON."""
    limits.prepare_process(1)
    from exporters.parity import Request

    request = Request.parse(request_text)
    try:
        report = importlib.import_module(f"exporters.{module}").run(request)
    except EdgetrainError as error:
        report = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:
        if not limits.is_out_of_memory(error):
            raise
        limits.lift_data_limit()
        report = {
            "error": BudgetBroken.__name__,
            "message": "comparing the export with the model takes more than the "
            f"{format_bytes(request.budget_bytes or 0)} that the budget leaves for it",
            "hint": "Give a larger budget. One graph for each block needs less than a single file.",
        }
    print(json.dumps({"peak_bytes": usage().peak_bytes, **report}))


if __name__ == "__main__":
    main(*sys.argv[1:])
