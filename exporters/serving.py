"""An export in use: its graphs opened when they are needed, and the budget in force. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from devices import limits, meter
from edgetrain.errors import BudgetBroken
from edgetrain.units import MIB, advised_mib, format_bytes
from exporters.manifest import MODEL_DATA, WEIGHTS, LanguageManifest, TextManifest
from exporters.runtime import Floats, import_onnxruntime, model_errors, open_model

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_ROOM_BYTES = 64 * MIB
"""What onnxruntime takes for itself and for a graph that runs."""

_COPIES = {"fp32": 1, "int8": 1, "fp16": 5}
"""How many times their bytes the weights of graphs that stay open take: a CPU computes with 16 bits in float32, and
keeps copies for it."""


@contextmanager
def within(budget_bytes: int | None, what: str, mapped_bytes: int = 0, touched_bytes: int = 0) -> Iterator[None]:
    """Keeps this process within a budget: what onnxruntime asks for beyond it is refused.

    Args:
        what: what is done, as in "generating text".
        mapped_bytes: weights that are mapped from files at a time, twice: the limit counts both mappings.
        touched_bytes: how many of them are going to be resident.

    Raises:
        BudgetBroken: it does not suffice.
    """
    if budget_bytes is None:
        yield
        return
    hint = "Give a larger budget."
    import_onnxruntime()
    try:
        if limits.supported():
            now = meter.usage()
            limit = limits.data_limit_for(budget_bytes - touched_bytes, now)
            if limit < now.data_bytes:
                least = budget_bytes + now.data_bytes - limit
                raise BudgetBroken(
                    f"{what} takes {format_bytes(least)} without room to compute in, more than the budget of "
                    f"{format_bytes(budget_bytes)}",
                    f"Give it {advised_mib(least + _ROOM_BYTES)}MiB.",
                )
            limits.set_data_limit(limit + 2 * mapped_bytes)
        yield
    except MemoryError as error:
        raise BudgetBroken(f"{what} takes more than the budget of {format_bytes(budget_bytes)}", hint) from error
    finally:
        limits.lift_data_limit()
    peak = meter.usage().peak_bytes
    if peak > budget_bytes:
        told = f"{what} took {format_bytes(peak)}, more than the budget of {format_bytes(budget_bytes)}"
        raise BudgetBroken(told, hint)


class Runner:
    """The graphs of an export in ``folder``, of which ``budget_bytes`` decides whether all stay open: None, they do."""

    def __init__(
        self, folder: Path, manifest: LanguageManifest | TextManifest, num_threads: int, budget_bytes: int | None
    ) -> None:
        self._folder, self._num_threads, self._budget_bytes = folder, num_threads, budget_bytes
        self.weights_bytes = manifest.files[MODEL_DATA if manifest.single_file else WEIGHTS].bytes
        self._num_graphs = len(manifest.graphs)
        resident = meter.usage().resident_bytes + _COPIES[manifest.storage] * self.weights_bytes + _ROOM_BYTES
        self.keeps = budget_bytes is None or resident <= budget_bytes
        self._open: dict[str, InferenceSession] = {}

    def within(self, what: str) -> Any:
        """The budget in force."""
        touched = self.weights_bytes if self.keeps else self.weights_bytes // self._num_graphs
        return within(self._budget_bytes, what, self.weights_bytes, touched)

    def compute(
        self, file: str, given: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, Floats]:
        """The outputs of a graph by name, or some of them; the inputs that it has no use for are left out.

        Raises:
            BadInput: onnxruntime cannot run it.
            MemoryError: there is none left.
        """
        if file not in self._open and not self.keeps:
            self._open.clear()  # before the next one is loaded
        model = self._open.get(file) or open_model(self._folder / file, self._num_threads)
        self._open[file] = model
        names = list(outputs) if outputs is not None else [one.name for one in model.get_outputs()]
        wanted = {one.name for one in model.get_inputs()}
        with model_errors(self._folder / file):
            found = model.run(names, {name: array for name, array in given.items() if name in wanted})
        # What onnxruntime gives keeps all memory alive that the graph ran in.
        return dict(zip(names, found if self.keeps else map(np.array, found), strict=True))
