"""What a language model writes, and numbers for it: what a judge says of it, and how various it is.

A judge, another model trained on the same text, is quick to like what repeats itself: its bits a token stand beside
distinct-n, the part of all n-grams of words that are different ones (Li et al., arXiv 1510.03055). Both are to be
compared with what they are of the real text, in equal amounts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OPENING = 24
TOKENS = 100
"""Written after an opening, which together is no more than was seen in training."""


def openings(source: Path, count: int) -> list[tuple[str, str]]:
    """So many places of a text, far from each other: the beginning of each and what follows, as much as is written."""
    text = source.read_text()
    starts = (len(text) * i // count for i in range(count))
    return [(text[at : at + _OPENING], text[at + _OPENING : at + _OPENING + TOKENS]) for at in starts]


def judged(session: Path | None, judge: Path, places: Sequence[tuple[str, str]], steps: int) -> dict[str, float]:
    """Bits a token of what a session's model writes by so many Euler steps, by a judge; and distinct-2, in per cent.
    ``session`` None: of what the real text goes on with."""
    written = [real for _, real in places] if session is None else _continued(session, places, steps)
    return {"judged": _bits(judge, places, written), "distinct-2": 100 * distinct(written, 2)}


def distinct(written: Sequence[str], n: int) -> float:
    """Different n-grams of words among all of them."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, written) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _continued(session: Path, places: Sequence[tuple[str, str]], steps: int) -> list[str]:
    """At temperature 1, each with a seed of its own."""
    from edgetrain import generation

    model, text = _opened(session)
    written = []
    for seed, (opening, _) in enumerate(places):
        read, how = model.context(steps, seed).read, generation.Sampling(temperature=1.0, seed=seed)
        written.append(text.decode(list(generation.generate(read, _ids(text, opening), TOKENS, frozenset(), how))))
    return written


def _bits(judge: Path, places: Sequence[tuple[str, str]], written: Sequence[str]) -> float:
    """Of what was written, after its opening."""
    model, text = _opened(judge)
    total, count = 0.0, 0
    for (opening, _), one in zip(places, written, strict=True):
        ids, skipped = _ids(text, opening + one), len(_ids(text, opening))
        each = model._costs(ids[None, :-1], ids[None, 1:], 0, 1, 1)["whole"][0, skipped - 1 :]
        total, count = total + float(each.sum()), count + each.size
    return total / count / math.log(2)


def _ids(text: Any, written: str) -> Any:
    import numpy as np

    return np.concatenate([tokens.ids for tokens in text.encode([written])])


def _opened(session: Path) -> tuple[Any, Any]:
    import devices
    from edgetrain.generation import Text
    from edgetrain.session import Session
    from edgetrain.text_sampling import TextModel

    found = Session.open(session)
    model = TextModel(found, devices.open_device("cpu"), 1)
    return model, Text(found.model_files, found.spec.text_model.vocab_size)
