"""Runs an exported stack with onnxruntime alone: no torch, one part in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgetrain.errors import BadInput
from exporters.manifest import HEAD, STEM, StackManifest, layer_file
from exporters.runtime import model_errors, open_model


class StackRunner:
    """An export, opened.

    Raises:
        BadInput: the folder is no export of a stack, or a damaged one.
    """

    def __init__(self, folder: Path, num_threads: int = 1) -> None:
        self.manifest = StackManifest.read(folder)
        self._folder, self._num_threads = folder, num_threads

    def run(self, given: NDArray[Any]) -> NDArray[Any]:
        """The output for a batch of inputs.

        Raises:
            BadInput: onnxruntime cannot run a part.
        """
        known = {"input": given, "hidden": given}
        files = [STEM] if self.manifest.stem else []
        files += [layer_file(number) for number in self.manifest.order]
        files += [HEAD] if self.manifest.head else []
        for file in files:
            path = self._folder / file
            model = open_model(path, self._num_threads)
            wanted = [one.name for one in model.get_inputs()]
            names = [one.name for one in model.get_outputs()]
            with model_errors(path):
                found = dict(zip(names, model.run(names, {name: known[name] for name in wanted}), strict=True))
            known |= found
            known["hidden"] = found["output"] if "output" in found else found["next"]
        if not files:
            raise BadInput(f"{self._folder} has no parts")
        return known["hidden"]
