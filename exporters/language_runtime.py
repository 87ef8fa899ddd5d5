"""Runs an exported language model with onnxruntime alone: no torch, and where memory is short one graph at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.manifest import EMBEDDING, MODEL, NORM, LanguageManifest, layer_file, logits_file
from exporters.serving import Runner

Floats = NDArray[np.float32]
TOKENS_AT_ONCE = 64
"""Of a text that is read: what a graph takes grows with them."""

KeyValues = list[tuple[Floats, Floats]]
"""Of each layer, keys and values (n, kv_heads, tokens, head_dim)."""


class LanguageRunner(Runner):
    """An export, opened; ``budget_bytes`` as of a ``Runner``.

    Raises:
        BadInput: the folder is no export of a language model, or a damaged one.
    """

    def __init__(self, folder: Path, num_threads: int = 1, budget_bytes: int | None = None) -> None:
        self.manifest = LanguageManifest.read(folder)
        super().__init__(folder, self.manifest, num_threads, budget_bytes)

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
        return list(self.compute(file, inputs, outputs).values())


class LanguageContext:
    """What an exported model has read of one text."""

    def __init__(self, runner: LanguageRunner) -> None:
        self._runner = runner
        self._past = runner.empty(1)

    def read(self, tokens: NDArray[np.int64]) -> Floats:
        """Reads on, ``tokens`` (length,), some at a time; the logits (vocab_size,) of what comes next."""
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            part = tokens[None, start : start + TOKENS_AT_ONCE]
            logits, self._past = self._runner.run(part, self._past, last=True)
        last: Floats = logits[0, -1]
        return last
