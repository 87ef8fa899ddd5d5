"""What texts cost an exported language model, as ``edgetrain evaluate`` measures it of a session. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain import masking
from edgetrain.data.tokens import TextDataset
from edgetrain.noise import masking_block
from edgetrain.randomness import Purpose, Stream, normal
from exporters.language_runtime import LanguageRunner
from exporters.manifest import LanguageManifest, TextManifest
from exporters.runtime import Floats
from exporters.text_runtime import TextRunner

_DRAWS = 8  # of a block's band of t, as evaluate takes them of a session

Tokens = NDArray[np.int64]
Cost = Callable[[int, Tokens, Tokens, Floats], tuple[float, float]]
"""(number of an example, tokens, targets and weights, each (1, length)) -> nats, and how many tokens they are of."""


@dataclass(frozen=True)
class Evaluation:
    """``nats``: the mean cost of a token that counts, or at most so much."""

    readout: str
    nats: float
    is_bound: bool
    num_examples: int
    num_tokens: int


def evaluate(  # noqa: PLR0917
    folder: Path,
    manifest: LanguageManifest | TextManifest,
    dataset: TextDataset,
    num_threads: int,
    budget_bytes: int | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Of the examples of ``dataset``, or the first ``limit`` of them, one after the other.

    The readout is what the session's evaluation calls it: "whole"; "elbo", a bound; or of next tokens by blocks
    "sigma_max", and of their single graph, which begins at z = 0, "sigma_max-mode".

    Raises:
        BudgetBroken: it took more than the budget.
    """
    cost: Cost
    runner: LanguageRunner | TextRunner
    if isinstance(manifest, LanguageManifest):
        runner = LanguageRunner(folder, num_threads, budget_bytes)
        readout, cost = "whole", _language(runner)
    else:
        runner = TextRunner(folder, num_threads, budget_bytes)
        readout, cost = _text(runner)
    num_examples = dataset.num_examples if limit is None else min(limit, dataset.num_examples)
    nats = tokens = 0.0
    with runner.within("evaluating"):
        for number in range(num_examples):
            more, count = cost(number, *dataset.read(np.array([number])))
            nats, tokens = nats + more, tokens + count
    return Evaluation(readout, nats / max(1.0, tokens), readout == "elbo", num_examples, int(tokens))


def _language(runner: LanguageRunner) -> Cost:
    def cost(number: int, tokens: Tokens, targets: Tokens, weights: Floats) -> tuple[float, float]:
        logits, _ = runner.run(tokens, runner.empty(1))
        return float((_negative_log(logits, targets) * weights).sum()), float(weights.sum())

    return cost


def _text(runner: TextRunner) -> tuple[str, Cost]:
    manifest = runner.manifest

    def masked(number: int, tokens: Tokens, targets: Tokens, weights: Floats) -> tuple[float, float]:
        text, own = masking.texts(tokens, targets, weights)
        num_levels, total = _DRAWS * manifest.schedule.num_blocks, 0.0
        for middle, t, is_masked in masking.levels(manifest.seed, text, number, num_levels, own > 0):
            given = masking.hidden(text, is_masked, manifest.vocab_size)
            block = masking_block(manifest.schedule.num_blocks, middle)
            logits = runner.unmasking_logits(given, float(t[0]), block)
            each = _negative_log(logits, np.maximum(text, 0))
            total += float((each * is_masked).sum() / t[0] / num_levels)
        return total, float((own > 0).sum())

    def following(number: int, tokens: Tokens, targets: Tokens, weights: Floats) -> tuple[float, float]:
        length, width = tokens.shape[1], manifest.width
        given: dict[str, NDArray[np.generic]] = {}
        if not (manifest.single_file or manifest.whole):
            sigma_max = manifest.schedule.sigma_max
            eps = normal(Stream(manifest.seed, Purpose.EVALUATION_NOISE), number, 1, length * width)
            scale = np.float32((1 + sigma_max**2) ** 0.5)
            given = {"z": scale * eps.reshape(1, length, width), "sigma": np.array([sigma_max], np.float32)}
        elif manifest.whole and not sum(manifest.layers):
            state = normal(Stream(manifest.seed, Purpose.EVALUATION_NOISE), number, 1, length * width)
            given = {"state": state.reshape(1, length, width), "loops": np.array(manifest.loops, np.int64)}
        if sum(manifest.layers):
            outputs, _ = runner.read(0, tokens, runner.empty(0, 1), given)
        else:
            outputs = runner.run(0, {"input_ids": tokens, **given})
        return float((_negative_log(outputs["logits"], targets) * weights).sum()), float(weights.sum())

    if manifest.family == "masked":
        return "elbo", masked
    return "whole" if manifest.whole else "sigma_max-mode" if manifest.single_file else "sigma_max", following


def _negative_log(logits: Floats, targets: Tokens) -> NDArray[np.float64]:
    """Of the softmax at the targets: logits (n, length, vocab_size), targets (n, length) -> (n, length)."""
    largest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(-1, dtype=np.float64)) + largest[..., 0]
    chosen: NDArray[np.float64] = total - np.take_along_axis(logits, targets[..., None], 2)[..., 0]
    return chosen
