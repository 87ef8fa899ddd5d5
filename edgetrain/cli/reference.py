"""``python -m edgetrain.cli.reference REQUEST``: what export turns into to run the model with torch, and back.

Torch needs nearly all of a small budget, so no process waits for it. The outputs are left in a file without a name,
whose descriptor is passed on: whatever ends the process, nothing is left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edgetrain.cli import options
from edgetrain.cli.become import become
from edgetrain.cli.main import ended, guarded

if TYPE_CHECKING:
    from exporters.parity import Reference

_RESULT = "EDGETRAIN_REFERENCE"


def referenced(session: Path, to: Path, single_file: bool, budget_bytes: int | None) -> Reference:
    """What torch computes of ``session``; without it this process ends here and begins again with it.

    Raises:
        DiskError: nothing can be written where ``to`` is to be.
    """
    from edgetrain.store.disk import disk_errors
    from exporters.parity import Reference

    request = [str(session), single_file, budget_bytes]
    brought = json.loads(os.environ.pop(_RESULT, "null"))
    if brought is not None and brought["request"] == request:
        reference = Reference(**brought["reference"])
        os.set_inheritable(reference.descriptor, False)
        return reference
    graphs = graphs_of(to)
    folder = graphs.parent
    with disk_errors(folder):
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    os.set_inheritable(file.fileno(), True)
    with disk_errors(folder):
        shutil.rmtree(graphs, ignore_errors=True)  # what a kill left
    told = {"request": request, "descriptor": file.fileno(), "graphs": str(graphs), "command": sys.orig_argv[1:]}
    return become(["-m", "edgetrain.cli.reference", json.dumps(told)])


def graphs_of(to: Path) -> Path:
    """Where torch leaves the graphs of a stack of somebody's own, until they are part of the export at ``to``: beside
    it, or where the first of the folders would be that are not there yet."""
    place = to.absolute()
    while not place.parent.exists():
        place = place.parent
    return place.with_name(f".{place.name}.graphs")


def main() -> None:
    told = json.loads(sys.argv[1])
    session, single_file, budget_bytes = told["request"]

    def computed() -> NoReturn:
        from devices import limits

        options.start_torch(1)
        from edgetrain.session import Session
        from edgetrain.spec import StackSpec
        from edgetrain.store.disk import disk_errors
        from exporters.reference import compute

        graphs = Path(told["graphs"])
        with disk_errors(graphs):
            opened = Session.open(Path(session))
            if isinstance(opened.spec.model, StackSpec):
                graphs.mkdir()
            try:
                result = compute(opened, single_file, told["descriptor"], budget_bytes, graphs)
            except BaseException:
                shutil.rmtree(graphs, ignore_errors=True)
                raise
        limits.lift_data_limit()
        os.environ[_RESULT] = json.dumps({"request": told["request"], "reference": asdict(result)})
        become(told["command"])

    ended(lambda: guarded(computed, as_json="--json" in told["command"]))


if __name__ == "__main__":
    main()
