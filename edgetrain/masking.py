"""Texts with some of their tokens masked, as masked diffusion reads them. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgetrain.randomness import Purpose, Stream, uniform


def texts(
    tokens: NDArray[np.int64], targets: NDArray[np.int64], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Inputs, next tokens and their weights as a data set gives them, each (n, length) -> the texts, -1 where there is
    padding, and the weight of each token of theirs: a first token counts if the one after it does."""
    length = tokens.shape[1]
    whole = np.concatenate([tokens[:, :1], targets], 1)[:, :length]
    own = np.concatenate([weights[:, :1], weights], 1)[:, :length]
    # Padding is what comes after the last that counts: no text ends in what does not.
    last = length - 1 - np.argmax(own[:, ::-1] > 0, 1)
    is_padding = np.arange(length)[None] > np.where((own > 0).any(1), last, -1)[:, None]
    return np.where(is_padding, -1, whole), own


def hidden(tokens: NDArray[np.int64], is_masked: NDArray[np.bool_], mask: int) -> NDArray[np.int64]:
    """Texts (n, length) with ``mask`` where they are masked, and in place of padding: it tells nothing."""
    return np.where(is_masked | (tokens < 0), mask, tokens)


def levels(
    seed: int, tokens: NDArray[np.int64], first: int, count: int, counts: NDArray[np.bool_] | None = None
) -> Iterator[tuple[float, NDArray[np.float64], NDArray[np.bool_]]]:
    """How the bound of MD4's equation 4 is taken of texts (n, length), the first of which has the number ``first``: a t
    of its own for each text in each of ``count`` equal parts of (0, 1], the highest first. The bound of a text is the
    mean over these of the cross-entropy of what is masked, over t.

    Args:
        counts: (n, length), which tokens may be masked; None: all.

    Yields:
        The middle of the part, t (n,), and which tokens are masked (n, length).
    """
    for level in range(count - 1, -1, -1):
        offset = uniform(Stream(seed, Purpose.EVALUATION_NOISE, 1, level), first, len(tokens))[:, 0]
        t = (level + offset) / count
        draws = uniform(Stream(seed, Purpose.EVALUATION_NOISE, 2, level), first, len(tokens), tokens.shape[1])
        is_masked = draws < t[:, None]
        yield (level + 0.5) / count, t, is_masked if counts is None else is_masked & counts
