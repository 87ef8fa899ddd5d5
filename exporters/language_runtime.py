"""Runs an exported language model with onnxruntime alone: no torch, and where memory is short one graph at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from devices import meter
from edgetrain.errors import BudgetBroken
from edgetrain.units import format_bytes
from exporters.manifest import EMBEDDING, MODEL, MODEL_DATA, NORM, WEIGHTS, LanguageManifest, layer_file, logits_file
from exporters.runtime import COPIES, ROOM_BYTES, model_errors, open_model

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Floats = NDArray[np.float32]
KeyValues = list[tuple[Floats, Floats]]
"""Of each layer, keys and values (n, kv_heads, tokens, head_dim)."""


class LanguageRunner:
    """An export, opened.

    Args:
        keeps: whether graphs stay open, their weights mapped; else one is at a time.

    Raises:
        BadInput: the folder is no export of a language model, or a damaged one.
    """

    def __init__(self, folder: Path, num_threads: int = 1, keeps: bool = True) -> None:
        self.manifest = LanguageManifest.read(folder)
        self._folder, self._num_threads, self._keeps = folder, num_threads, keeps
        self._open: dict[str, InferenceSession] = {}

    @property
    def weights_bytes(self) -> int:
        """Of all weights, which are mapped as far as graphs are open."""
        return self.manifest.files[MODEL_DATA if self.manifest.single_file else WEIGHTS].bytes

    def fits(self, budget_bytes: int) -> bool:
        """Whether all graphs may stay open."""
        weights_bytes = self.weights_bytes * COPIES[self.manifest.storage]
        return meter.usage().resident_bytes + weights_bytes + ROOM_BYTES <= budget_bytes

    def empty(self, n: int) -> KeyValues:
        """The past of a text that begins."""
        shape = (n, self.manifest.kv_heads, 0, self.manifest.head_dim)
        return [(np.empty(shape, np.float32), np.empty(shape, np.float32)) for _ in range(self.manifest.depth)]

    def run(
        self, tokens: NDArray[np.int64], past: KeyValues, *, mask: NDArray[np.int64] | None = None, last: bool = False
    ) -> tuple[Floats, KeyValues]:
        """Reads on.

        Args:
            tokens: (n, length), after what ``past`` holds.
            mask: (n, past + length), 1 where there is a token; None: everywhere.
            last: whether the logits of the last token alone are wanted.

        Returns:
            Logits (n, length, vocab_size), and keys and values with those of the tokens.
        """
        n, length = tokens.shape
        total = past[0][0].shape[2] + length
        mask = np.ones((n, total), np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -length:]
        common = {"attention_mask": mask, "position_ids": positions}
        if self.manifest.single_file:
            given = {"input_ids": tokens, **common}
            given |= {
                f"past_key_values.{number}.{name}": array
                for number, pair in enumerate(past)
                for name, array in zip(("key", "value"), pair, strict=True)
            }
            names = ["logits", *(f"present.{i}.{name}" for i in range(len(past)) for name in ("key", "value"))]
            logits, *presents = self._run(MODEL, names, given)
            return logits[:, -1:] if last else logits, list(zip(presents[::2], presents[1::2], strict=True))
        (hidden,) = self._run(EMBEDDING, ["hidden"], {"input_ids": tokens, "position_ids": positions})
        following: KeyValues = []
        for number, (key, value) in enumerate(past):
            given = {"inputs_embeds": hidden, **common, "past.key": key, "past.value": value}
            hidden, *present = self._run(layer_file(number), ["hidden", "present.key", "present.value"], given)
            following.append((present[0], present[1]))
        (normed,) = self._run(NORM, ["hidden"], {"inputs_embeds": hidden[:, -1:] if last else hidden})
        chunks = [
            self._run(logits_file(chunk), ["logits"], {"inputs_embeds": normed})[0]
            for chunk in range(self.manifest.num_chunks)
        ]
        return np.concatenate(chunks, -1), following

    def _run(self, file: str, outputs: Sequence[str], inputs: dict[str, NDArray[np.generic]]) -> list[Floats]:
        """Runs a graph; the inputs that it has no use for are left out."""
        model = self._open.get(file) or open_model(self._folder / file, self._num_threads)
        if self._keeps:
            self._open[file] = model
        wanted = {one.name for one in model.get_inputs()}
        with model_errors(self._folder / file):
            found: list[Floats] = model.run(list(outputs), {n: array for n, array in inputs.items() if n in wanted})
        # What onnxruntime gives keeps all memory alive that the graph ran in.
        return found if self._keeps else [np.array(one) for one in found]


class LanguageContext:
    """What an exported model has read of one text.

    Raises:
        BudgetBroken: reading took more than ``budget_bytes``.
    """

    def __init__(self, runner: LanguageRunner, budget_bytes: int | None = None) -> None:
        self._runner, self._budget_bytes = runner, budget_bytes
        self._past = runner.empty(1)

    def read(self, tokens: NDArray[np.int64]) -> Floats:
        """Reads on, ``tokens`` (length,); the logits (vocab_size,) of what comes next."""
        logits, self._past = self._runner.run(tokens[None], self._past, last=True)
        peak = meter.usage().peak_bytes
        if self._budget_bytes is not None and peak > self._budget_bytes:
            raise BudgetBroken(
                f"running the model took {format_bytes(peak)}, more than the budget of "
                f"{format_bytes(self._budget_bytes)}",
                "Give a larger budget, or export without --single-file: then one layer is in memory at a time.",
            )
        last: Floats = logits[0, -1]
        return last
