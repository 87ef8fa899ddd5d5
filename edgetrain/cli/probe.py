"""``python -m edgetrain.cli.probe REQUEST``: what a command turns into when no measurement is cached, and back.

Without a command to go back to, it prints the measurement.

A probe needs nearly as much memory as a small training. Beside the command it would exceed the budget, so it takes the
place of the command in the same process, and starts the command again with the result in its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from typing import Any, NoReturn

from devices.limits import without_block_cache
from edgetrain.cli.become import become
from edgetrain.cli.main import ended, guarded
from edgetrain.cli.options import start_torch
from edgetrain.errors import EdgetrainError
from edgetrain.plan import Probe, save_probe, saved_probe
from edgetrain.planning import parse_probe, smallest_budget_bytes
from edgetrain.recipe import resolve, to_toml
from edgetrain.spec import Spec
from edgetrain.streamed_plan import StreamedProbe

_RESULT = "EDGETRAIN_PROBE"
_BEGAN_ANEW = "EDGETRAIN_BEGAN_ANEW"
_ROOM_BEYOND_THE_SMALLEST = 1.05


def probed(
    spec: Spec, device: str, num_threads: int, budget_bytes: int, activations: str | None
) -> Probe | StreamedProbe:
    """The probe's measurement; without one this process ends here and begins again with it.

    Nothing may be held that the end of a process would not release. If the budget is too small, the measurement is one
    with as much room as the budget that does: what a refusal names must hold.
    """
    _begin_without_block_cache()
    brought = json.loads(os.environ.pop(_RESULT, "null"))
    if brought is not None and brought["request"][:-1] == [to_toml(spec), device, num_threads]:
        found = _parsed(spec, brought["measured"])
        save_probe(spec, device, num_threads, brought["measured"])
    else:
        found = _cached(spec, device, num_threads, budget_bytes)
    needed_bytes = budget_bytes
    if found is not None:
        smallest = smallest_budget_bytes(spec, found, activations)
        if smallest <= budget_bytes or found.covers(smallest):
            return found
        needed_bytes = round(_ROOM_BEYOND_THE_SMALLEST * smallest)
    request = [to_toml(spec), device, num_threads, needed_bytes]
    return become(["-m", "edgetrain.cli.probe", json.dumps({"request": request, "command": sys.orig_argv[1:]})])


def known(spec: Spec, device: str, num_threads: int, budget_bytes: int) -> Probe | StreamedProbe | None:
    """As ``probed``, if that was measured before; None otherwise."""
    _begin_without_block_cache()
    return _cached(spec, device, num_threads, budget_bytes)


def _begin_without_block_cache() -> None:
    if _BEGAN_ANEW not in os.environ and (environment := without_block_cache(os.environ)):
        become(sys.orig_argv[1:], {**environment, _BEGAN_ANEW: "1"})  # once, should the system drop the other one


def _cached(spec: Spec, device: str, num_threads: int, budget_bytes: int) -> Probe | StreamedProbe | None:
    """The measurement in the cache, unless something was left out of it that fits into this budget."""
    found = _parsed(spec, saved_probe(spec, device, num_threads))
    return found if found is not None and found.covers(budget_bytes) else None


def probed_beside(
    spec: Spec, device: str, num_threads: int, budget_bytes: int, activations: str | None
) -> Probe | StreamedProbe:
    """The same for a program that cannot end: measured by a process beside it, in memory that the budget lacks.

    Raises:
        EdgetrainError: what the other process raised.
    """
    found = _cached(spec, device, num_threads, budget_bytes)
    if found is None:
        found = _measured_beside(spec, device, num_threads, budget_bytes)
    smallest = smallest_budget_bytes(spec, found, activations)
    if smallest <= budget_bytes or found.covers(smallest):
        return found
    return _measured_beside(spec, device, num_threads, round(_ROOM_BEYOND_THE_SMALLEST * smallest))


def _measured_beside(spec: Spec, device: str, num_threads: int, budget_bytes: int) -> Probe | StreamedProbe:
    told = json.dumps({"request": [to_toml(spec), device, num_threads, budget_bytes], "command": None})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    done = subprocess.run(
        [sys.executable, "-m", "edgetrain.cli.probe", told],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().removeprefix("edgetrain: ").split("\n", 1)
        kinds = {kind.exit_code: kind for kind in EdgetrainError.__subclasses__()}
        raise kinds.get(done.returncode, EdgetrainError)(*said)
    measured = json.loads(done.stdout.splitlines()[-1])
    save_probe(spec, device, num_threads, measured)
    return parse_probe(spec, measured)


def _parsed(spec: Spec, measured: Mapping[str, Any] | None) -> Probe | StreamedProbe | None:
    """What an older version left in the cache is no measurement."""
    try:
        return None if measured is None else parse_probe(spec, measured)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def main() -> None:
    told = json.loads(sys.argv[1])
    recipe, device, num_threads, budget_bytes = told["request"]

    def measured() -> NoReturn:
        start_torch(num_threads)
        from edgetrain.probe import measure

        result = measure(resolve(tomllib.loads(recipe)), device, budget_bytes)
        if told["command"] is None:
            print(json.dumps(result))
            sys.exit()
        os.environ[_RESULT] = json.dumps({"request": told["request"], "measured": result})
        become(told["command"])

    ended(lambda: guarded(measured, as_json="--json" in (told["command"] or ())))


if __name__ == "__main__":
    main()
