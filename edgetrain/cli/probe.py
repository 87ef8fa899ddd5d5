"""``python -m edgetrain.cli.probe REQUEST``: what a command turns into when no measurement is cached, and back.

A probe needs nearly as much memory as a small training. Beside the command it would exceed the budget, so it takes the
place of the command in the same process, and starts the command again with the result in its environment.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from typing import NoReturn

from edgetrain.cli.become import become
from edgetrain.cli.main import guarded
from edgetrain.plan import Probe, save_probe, saved_probe, smallest_budget_bytes
from edgetrain.spec import Spec, resolve, to_toml

_RESULT = "EDGETRAIN_PROBE"
_ROOM_BEYOND_THE_SMALLEST = 1.05


def probed(spec: Spec, device: str, num_threads: int, budget_bytes: int, activations: str | None) -> Probe:
    """The probe's measurement; without one this process ends here and begins again with it.

    Nothing may be held that the end of a process would not release. If the budget is too small, the measurement is one
    with as much room as the budget that does: what a refusal names must hold.
    """
    brought = json.loads(os.environ.pop(_RESULT, "null"))
    if brought is not None and brought["request"][:-1] == [to_toml(spec), device, num_threads]:
        found: Probe | None = save_probe(spec, device, num_threads, brought["measured"])
    else:
        found = saved_probe(spec, device, num_threads, budget_bytes)
    needed_bytes = budget_bytes
    if found is not None:
        smallest = smallest_budget_bytes(spec, found, activations)
        if smallest <= budget_bytes or found.covers(smallest):
            return found
        needed_bytes = round(_ROOM_BEYOND_THE_SMALLEST * smallest)
    request = [to_toml(spec), device, num_threads, needed_bytes]
    return become(["-m", "edgetrain.cli.probe", json.dumps({"request": request, "command": sys.orig_argv[1:]})])


def main() -> None:
    told = json.loads(sys.argv[1])
    recipe, device, num_threads, budget_bytes = told["request"]

    def measured() -> NoReturn:
        from devices.limits import prepare_process

        prepare_process(num_threads)
        import torch

        from edgetrain.probe import measure

        torch.set_num_threads(num_threads)
        result = measure(resolve(tomllib.loads(recipe)), device, budget_bytes)
        os.environ[_RESULT] = json.dumps({"request": told["request"], "measured": result})
        become(told["command"])

    guarded(measured, as_json="--json" in told["command"])


if __name__ == "__main__":
    main()
