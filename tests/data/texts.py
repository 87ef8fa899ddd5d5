"""Texts opened with a small tokenizer, and the examples that reading them should give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetrain.data.text import TextDataset, open_text
from edgetrain.spec import TextSpec
from tests.data.test_chat import CHATML
from tests.data.text_files import END, SENTENCES, write_tokenizer

VOCAB_SIZE = 512  # room beyond the tokenizer's 400 tokens, as models have
TEXT = "\n".join(SENTENCES[(7 * i) % 5] + f" {i}" for i in range(60))


class Opener:
    """Opens text with a tokenizer in ``tmp/model``; ``tokenizer`` is the plain one, to compare with."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.model = tmp / "model"
        self.tokenizer = write_tokenizer(self.model, chat_template=CHATML)
        self.end = self.tokenizer.token_to_id(END)

    def __call__(
        self, source: Path | str, split: str = "train", *, seed: int = 5, vocab_size: int = VOCAB_SIZE, **spec: Any
    ) -> TextDataset:
        full = TextSpec(source=str(source), **{"length": 16, "held_out": 0.0, **spec})
        return open_text(full, split, self.model, vocab_size, self.tmp / "scratch", seed)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


Rows = list[tuple[list[int], list[int], list[float]]]


def read_all(dataset: TextDataset) -> Rows:
    inputs, targets, weights = dataset.read(np.arange(dataset.num_examples))
    assert inputs.shape == targets.shape == weights.shape == (dataset.num_examples, dataset.length)
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int64, np.int64, np.float32)
    return [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(inputs, targets, weights, strict=True)]


def examples(windows: Sequence[tuple[list[int], list[int]]], length: int) -> Rows:
    """What ``read`` should give: from the tokens and the flags of each example, one list after the other."""
    rows = []
    for ids, flags in windows:
        padding = [0] * (length + 1 - len(ids))
        rows.append((ids[:-1] + padding, ids[1:] + padding, [float(flag) for flag in flags[1:] + padding]))
    return rows


def joined(parts: Iterable[list[int]]) -> list[int]:
    return [item for part in parts for item in part]


def packed(ids: list[int], flags: list[int], length: int) -> Rows:
    places = range(0, len(ids) - 1, length)
    return examples([(ids[i : i + length + 1], flags[i : i + length + 1]) for i in places], length)


LINES = [
    {"text": "The lazy dog.", "id": 1},
    {"prompt": "Who jumps over the dog?\n", "completion": "The quick fox"},
    {"messages": [{"role": "user", "content": "Käfer?"}, {"role": "assistant", "content": "auf der Straße"}]},
    {"prompt": "", "completion": "no prompt"},
    {"prompt": "Stop.", "completion": ""},
]
