"""Runs an export with onnxruntime alone: no torch, one block in memory at a time."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import BadInput, EdgetrainError, UsageError
from edgetrain.noise import euler_coefficients
from edgetrain.randomness import Purpose, Stream, normal
from edgetrain.store import disk
from edgetrain.store.slot import read_header
from exporters.manifest import CODEBOOK, MODEL, WEIGHTS, Manifest, block_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Floats = NDArray[np.float32]

_TINY = np.float32(1e-12)
_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "Cannot allocate memory")


@dataclass(frozen=True)
class Prediction:
    """Probabilities (n, classes), averaged over the draws of noise: at the end of the chain, and those that the
    first step alone gives, at sigma_max, where the state carries nothing yet. Of a model trained as a whole both are
    those that it gives."""

    probabilities: Floats
    sigma_max_probabilities: Floats


class Predictor:
    """An export, opened.

    Raises:
        BadInput: the folder is no export, or a damaged one.
    """

    def __init__(self, folder: Path, num_threads: int = 1) -> None:
        self.manifest = Manifest.read(folder)
        if self.manifest.family != "vit":
            raise BadInput(f"{folder} is an export of a generator of images", "Use edgetrain generate.")
        self._folder = folder
        self._num_threads = num_threads
        self._loaded: tuple[str, InferenceSession] | None = None

    def predict(
        self,
        images: Floats,
        first_example: int,
        *,
        num_steps: int | None = None,
        projection: Literal["soft", "hard"] = "soft",
        draws: int = 0,
    ) -> Prediction:
        """Classifies a chunk of images; all steps of a block are taken before the next block is loaded.

        Args:
            images: (n, C, H, W) in [-1, 1].
            first_example: the number of the first image; the noise of each follows from its number and the draw's.
            num_steps: Euler steps, as many as blocks by default.
            projection: how logits become the state: as mean of the codebook rows, or as the likeliest one.
            draws: how many draws of noise to average over; 0: none, the chain begins at z = 0.

        Raises:
            UsageError: no steps, not the default chain from an export that is a single file, or any chain from
                one of a model trained as a whole.
            BadInput: the images have another shape, or a model of the export cannot be run.
        """
        manifest = self.manifest
        if images.ndim != 4 or images.shape[1:] != manifest.image_shape:
            raise BadInput(f"images of shape {images.shape}; the model takes {('n', *manifest.image_shape)}")
        if draws < 0:
            raise UsageError(f"{draws} draws of noise")
        num_blocks = manifest.schedule.num_blocks
        steps = num_blocks if num_steps is None else num_steps
        if manifest.single_file and (steps, projection) != (num_blocks, "soft"):
            raise UsageError(
                f"{self._folder} is a single file, which runs {num_blocks} steps with soft projection and nothing else",
                "Export without --single-file for other chains.",
            )
        images = np.ascontiguousarray(images, np.float32)
        if manifest.whole:
            if (num_steps, projection, draws) != (None, "soft", 0):
                raise UsageError(f"the model in {self._folder} was trained as a whole: it has no chain and no noise")
            found = _mean_softmax(self._run(MODEL if manifest.single_file else block_file(0), {"images": images}))
            return Prediction(found, found)
        noise = [
            normal(Stream(manifest.seed, Purpose.EVALUATION_NOISE, 0, draw), first_example, len(images), manifest.width)
            for draw in range(draws)
        ] or [np.zeros((len(images), manifest.width), np.float32)]
        if manifest.single_file:
            readouts = [self._run(MODEL, {"images": images, "noise": one}) for one in noise]
            last, first = ([logits[i] for logits in readouts] for i in range(2))
        else:
            last, first = self._chain(images, noise, steps, projection == "hard")
        return Prediction(_mean_softmax(last), _mean_softmax(first))

    def _chain(
        self, images: Floats, noise: Sequence[Floats], num_steps: int, hard: bool
    ) -> tuple[list[Floats], list[Floats]]:
        """Logits (n, classes) of the last and of the first step, for each draw of noise."""
        schedule = self.manifest.schedule
        grid = schedule.grid(num_steps)
        next_sigmas = [sigma for sigma, _ in grid[1:]] + [0.0]
        shape = (self.manifest.num_classes, self.manifest.width)
        codebook = unit_rows(self._folder, shape) if hard else None
        states = [np.float32(math.sqrt(1 + schedule.sigma_max**2)) * one for one in noise]
        first: list[Floats] = []
        logits: list[Floats] = []
        for block, steps in groupby(zip(grid, next_sigmas, strict=True), key=lambda step: step[0][1]):
            for (sigma, _), next_sigma in steps:
                a, b = euler_coefficients(sigma, next_sigma)
                sigmas = np.full(len(images), sigma, np.float32)
                logits = []
                for draw, z in enumerate(states):
                    inputs = {"images": images, "z": z, "sigma": sigmas}
                    outputs = self._run(block_file(block), inputs)
                    denoised = outputs[1] if codebook is None else codebook[outputs[0].argmax(1)]
                    states[draw] = np.float32(a) * z + np.float32(b) * denoised
                    logits.append(outputs[0])
                first = first or logits
        return logits, first

    def _run(self, file: str, inputs: Mapping[str, Floats]) -> list[Floats]:
        """The outputs of one of the models: two, or of one trained as a whole the logits."""
        if self._loaded is None or self._loaded[0] != file:
            self._loaded = None  # before the next one is loaded
            self._loaded = (file, open_model(self._folder / file, self._num_threads))
        with model_errors(self._folder / file):
            outputs: list[Floats] = self._loaded[1].run(None, dict(inputs))
        rows, classes = len(inputs["images"]), self.manifest.num_classes
        second = classes if self.manifest.single_file else self.manifest.width
        expected = [(rows, classes), (rows, second)][: 1 if self.manifest.whole else 2]
        if [output.shape for output in outputs] != expected:
            raise BadInput(f"{self._folder / file} does not compute what the manifest says")
        return outputs


def unit_rows(folder: Path, shape: tuple[int, int]) -> Floats:
    """The codebook of an export, its rows of length 1.

    Raises:
        BadInput: there is none of that shape.
    """
    path = folder / WEIGHTS
    try:
        header = read_header(path)
        entry = header.tensors.get(CODEBOOK)
        if entry is None or (entry.dtype, entry.shape) != ("F32", shape):
            raise BadInput(f"{path} has no {CODEBOOK} of shape {shape}")
        with path.open("rb") as file, disk.disk_errors(path):
            rows = np.fromfile(
                file, np.float32, entry.end // 4 - entry.begin // 4, offset=header.data_start + entry.begin
            )
    except EdgetrainError as error:
        raise BadInput(error.message, "Export the session again.") from error
    rows = rows.reshape(shape)
    found: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
    return found


def open_model(path: Path, num_threads: int) -> InferenceSession:
    """A model, its weights left where they are: mapped, not packed into copies.

    Raises:
        BadInput: onnxruntime cannot load it.
    """
    ort = import_onnxruntime()
    options = session_options(num_threads)
    options.add_session_config_entry("session.disable_prepacking", "1")
    with model_errors(path):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_options(num_threads: int) -> Any:
    """onnxruntime's, quiet and with so many threads."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def import_onnxruntime() -> Any:
    """The module onnxruntime. Its training build imports torch where there is one: stand-ins prevent that."""
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"]
    stand_ins = {
        "onnxruntime.training": types.ModuleType("onnxruntime.training"),
        "onnxruntime.training.ortmodule": None,
    }
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    try:
        import onnxruntime
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
    return onnxruntime


@contextmanager
def model_errors(path: Path | str, hint: str = "Export the session again.") -> Iterator[None]:
    """onnxruntime raises classes of its own that have no common base below Exception."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = str(error)
        if any(phrase in text for phrase in _OUT_OF_MEMORY):
            raise MemoryError(f"{path}: {text}") from error
        raise BadInput(f"{path} cannot be run: {text}", hint) from error


def _mean_softmax(logits: Sequence[Floats]) -> Floats:
    """The mean over draws of the softmax of each (n, classes)."""
    total = np.zeros_like(logits[0])
    for one in logits:
        exponentials = np.exp(one - one.max(1, keepdims=True))
        total += exponentials / exponentials.sum(1, keepdims=True)
    return total / np.float32(len(logits))
