"""Runs an exported language model that was trained from the beginning, with onnxruntime alone: no torch.

A graph is open at a time where memory is short. What is drawn is what the session draws for an equal seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import BadInput
from edgetrain.noise import euler_coefficients, masking_block
from edgetrain.randomness import Purpose, Stream, normal
from exporters.language_runtime import TOKENS_AT_ONCE
from exporters.manifest import TextManifest
from exporters.runtime import Floats, unit_rows
from exporters.serving import Runner

Tokens = NDArray[np.int64]


class TextRunner(Runner):
    """An export, opened; ``budget_bytes`` as of a ``Runner``.

    Raises:
        BadInput: the folder is no export of such a model, or a damaged one.
    """

    def __init__(self, folder: Path, num_threads: int = 1, budget_bytes: int | None = None) -> None:
        self.manifest = TextManifest.read(folder)
        super().__init__(folder, self.manifest, num_threads, budget_bytes)

    def run(self, block: int, given: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
        """All outputs of a block's graph, by name; the inputs that it has no use for are left out.

        Raises:
            BadInput: it does not compute what the manifest says.
        """
        file = self.manifest.graphs[block]
        found = self.compute(file, given)
        logits = found.get("logits")
        if logits is None or logits.shape != (*given["input_ids"].shape, self.manifest.vocab_size):
            raise BadInput(f"{self._folder / file} does not compute what the manifest says")
        return found

    def empty(self, block: int, n: int) -> dict[str, Floats]:
        """The past of a text that begins, by the names of the inputs."""
        shape = (n, self.manifest.heads, 0, self.manifest.head_dim)
        layers = range(self.manifest.layers[block])
        return {f"past_key_values.{i}.{kind}": np.empty(shape, np.float32) for i in layers for kind in ("key", "value")}

    def read(
        self, block: int, tokens: Tokens, past: Mapping[str, Floats], more: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Reads tokens (n, length) after a past, by a graph that has one: its outputs, and the past with these."""
        n, length = tokens.shape
        before = next(iter(past.values())).shape[2]
        mask = np.ones((n, before + length), np.int64)
        positions = np.broadcast_to(np.arange(before, before + length), (n, length))
        outputs = self.run(
            block, {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **past, **more}
        )
        return outputs, {name: outputs[name.replace("past_key_values", "present")] for name in past}

    def unmasking_logits(self, tokens: Tokens, t: float, block: int | None = None) -> Floats:
        """Of masked tokens (n, length) by a block, that which owns t if none is named, (n, length, vocab_size)."""
        manifest = self.manifest
        if manifest.single_file:
            block = 0
        elif block is None:
            block = masking_block(manifest.schedule.num_blocks, t)
        ts = np.full(1 if manifest.single_file else len(tokens), t, np.float32)
        return self.run(block, {"input_ids": tokens, "t": ts})["logits"]

    def rows(self) -> Floats:
        """Of the codebook, (vocab_size, width), of unit length."""
        return unit_rows(self._folder, (self.manifest.vocab_size, self.manifest.width))


class TextContext:
    """What an exported next-token model has read of one text; each token takes ``num_steps`` Euler steps.

    ``loops``: how often the core of a recurrent model that was trained as a whole runs; None: as in training.
    """

    def __init__(self, runner: TextRunner, num_steps: int, seed: int, loops: int | None = None) -> None:
        self._runner, self._num_steps, self._seed = runner, num_steps, seed
        self._manifest = runner.manifest
        self._loops = loops or self._manifest.loops
        self._tokens = np.empty(0, np.int64)
        self._pasts: dict[int, dict[str, Floats]] = {}
        self._is_cached = sum(self._manifest.layers) > 0
        needs_rows = not (self._manifest.whole or self._manifest.single_file) and not self._has_two_streams
        self._rows = runner.rows() if needs_rows else None

    @property
    def _has_two_streams(self) -> bool:
        return self._is_cached and self._manifest.streams == 2

    def read(self, tokens: Tokens) -> Floats:
        """Reads on, ``tokens`` (length,), some at a time if there are keys and values; the logits (vocab_size,) of what
        comes next."""
        is_one = self._manifest.whole or self._manifest.single_file
        at_once = TOKENS_AT_ONCE if self._is_cached and (is_one or self._has_two_streams) else len(tokens)
        for start in range(0, len(tokens), at_once):
            part = tokens[start : start + at_once]
            self._tokens = np.concatenate([self._tokens, part])
            logits = self._whole(part) if is_one else self._chain(part)
        last: Floats = logits[0, -1]
        return last

    def _whole(self, tokens: Tokens) -> Floats:
        if self._is_cached:
            past = self._pasts.get(0) or self._runner.empty(0, 1)
            outputs, self._pasts[0] = self._runner.read(0, tokens[None], past, {})
            return outputs["logits"]
        given: dict[str, NDArray[Any]] = {"input_ids": self._tokens[None]}
        if self._manifest.whole:
            state = normal(
                Stream(self._manifest.seed, Purpose.EVALUATION_NOISE), 0, 1, len(self._tokens) * self._manifest.width
            )
            given["state"] = state.reshape(1, len(self._tokens), self._manifest.width)
            given["loops"] = np.array(self._loops, np.int64)
        return self._runner.run(0, given)["logits"]

    def _chain(self, tokens: Tokens) -> Floats:
        """Logits at the chain's end; steps of a block follow each other."""
        manifest, runner = self._manifest, self._runner
        grid = [*manifest.schedule.grid(self._num_steps), (0.0, -1)]
        number, width = len(self._tokens) - 1, manifest.width
        scale = np.float32((1 + manifest.schedule.sigma_max**2) ** 0.5)
        state = scale * normal(Stream(self._seed, Purpose.NOISE, 0, number), 0, 1, width).reshape(1, 1, width)
        outputs: dict[str, Floats] = {}
        following_pasts: dict[int, dict[str, Floats]] = {}
        for (sigma, block), (following, _) in itertools.pairwise(grid):
            sigmas = np.array([sigma], np.float32)
            if self._has_two_streams:
                # Only the last noisy token is asked for; none sees another one.
                z = np.concatenate([np.zeros((1, len(tokens) - 1, width), np.float32), state], 1)
                past = self._pasts.get(block) or runner.empty(block, 1)
                outputs, following_pasts[block] = runner.read(block, tokens[None], past, {"z": z, "sigma": sigmas})
            else:
                given = {"z": self._with_known(state, sigma), "sigma": sigmas}
                if self._is_cached:
                    outputs, _ = runner.read(block, self._tokens[None], runner.empty(block, 1), given)
                else:
                    outputs = runner.run(block, {"input_ids": self._tokens[None], **given})
            a, b = (np.float32(one) for one in euler_coefficients(sigma, following))
            state = a * state + b * outputs["denoised"][:, -1:]
        self._pasts |= following_pasts
        return outputs["logits"]

    def _with_known(self, state: Floats, sigma: float) -> Floats:
        """Before the last one the rows of tokens that are known, as noisy as in training: (1, tokens, width)."""
        assert self._rows is not None
        known = self._rows[self._tokens[1:]]
        noise = normal(Stream(self._seed, Purpose.EVALUATION_NOISE), 0, len(known), self._manifest.width)
        whole: Floats = np.concatenate([(known + np.float32(sigma) * noise)[None], state], 1)
        return whole
