"""Text to tokens, piece by piece, with the ids that the whole text would get at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import BadInput

TOKENIZER = "tokenizer.json"

# In characters. The tokenizer's own tables take far more than a chunk; the context is many times what a tokenizer looks
# at around a place.
_CHUNK = 1 << 15
_CONTEXT = 512
_MAX_TRIES = 8


@dataclass(frozen=True)
class Tokens:
    """Some consecutive tokens of a document: ids, and the characters of the document that each stands for."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def part(self, start: int, end: int) -> Tokens:
        """Those that start in ``start .. end - 1``."""
        kept = (self.starts >= start) & (self.starts < end)
        return Tokens(self.ids[kept], self.starts[kept], self.ends[kept])

    def shifted(self, by: int) -> Tokens:
        return Tokens(self.ids, self.starts + by, self.ends + by)

    def inside(self, spans: Iterable[tuple[int, int]] | None) -> NDArray[np.bool_]:
        """Which tokens have a character in one of the spans, all for None; one without characters has the next one."""
        if spans is None:
            return np.ones(len(self.ids), bool)
        found = np.zeros(len(self.ids), bool)
        for start, end in spans:
            found |= (self.starts < end) & (np.maximum(self.ends, self.starts + 1) > start)
        return found


class Tokenizer:
    """tokenizer.json of a folder, for text alone: nothing is added, cut off or padded.

    Raises:
        BadInput: the file is missing or damaged, or knows ids of ``vocab_size`` and above.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        # A pool of threads takes memory for each, and a later fork would warn of it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self._path = folder / TOKENIZER
        self.vocab_size = vocab_size
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except MemoryError:
            raise
        except Exception as error:  # the library has no class of its own for this
            raise BadInput(
                f"{self._path} is no tokenizer, or damaged: {error}", "Copy the tokenizer's files again."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # It adds special tokens, which are not wanted, and trims spaces off the offsets, which are.
        self._tokenizer.post_processor = None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise BadInput(f"{self._path} has an empty vocabulary", "Copy the tokenizer's files again.")
        token = max(vocabulary, key=vocabulary.__getitem__)
        self.check(vocabulary[token], repr(token))

    def check(self, number: int, token: str = "") -> None:
        """Raises BadInput if ``number`` is no id of the model."""
        if not 0 <= number < self.vocab_size:
            raise BadInput(
                f"{self._path.parent} has the token {number}{token and f' ({token})'}, and the model's vocabulary has "
                f"{self.vocab_size} tokens, 0 to {self.vocab_size - 1}",
                "Check that the tokenizer and the model belong together.",
            )

    def token_to_id(self, token: str) -> int | None:
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def encode(self, pieces: Iterable[str]) -> Iterator[Tokens]:
        """The tokens of one document, given in pieces, a bounded number at a time.

        The text is cut into overlapping chunks. One chunk takes over from the other at a place that both tokenise
        alike, on either side, so the tokens are those of the whole text. Where a chunk has no such place (thousands of
        characters without a word), it is cut all the same.
        """
        text, first, done = "", 0, 0  # text begins at character ``first``; its tokens up to ``done`` are out
        slices = _slices(pieces)
        while piece := next(slices, ""):
            text += piece
            if len(text) < _CHUNK:
                continue
            tokens = self._encode(text)
            cut = self._cut(text, tokens)
            yield tokens.part(done, cut).shifted(first)
            kept = cut - _CONTEXT
            text, first, done = text[kept:], first + kept, _CONTEXT
        if len(text) > done:
            yield self._encode(text).part(done, len(text) + 1).shifted(first)

    def _cut(self, text: str, tokens: Tokens) -> int:
        """A place in the second half of ``text`` where the next chunk may take over."""
        is_boundary = tokens.starts[1:] >= tokens.ends[:-1]
        boundaries = tokens.starts[1:][is_boundary]
        last = len(text) - _CONTEXT
        boundaries = boundaries[(boundaries >= len(text) // 2) & (boundaries <= last)][::-1]
        lines = [place for place in boundaries.tolist() if text[place - 1] == "\n"][:_MAX_TRIES]
        others = boundaries[:: max(1, len(boundaries) // _MAX_TRIES)].tolist()
        for place in lines + others:
            if self._agrees(text, tokens, place):
                return int(place)
        return int(boundaries[0]) if len(boundaries) else last

    def _agrees(self, text: str, tokens: Tokens, place: int) -> bool:
        """Whether the tokens around ``place`` stay the same when the text begins shortly before it."""
        begin, near = place - _CONTEXT, (place - _CONTEXT // 2, place + _CONTEXT // 2)
        again = self._encode(text[begin : place + _CONTEXT]).shifted(begin).part(*near)
        before = tokens.part(*near)
        return np.array_equal(before.ids, again.ids) and np.array_equal(before.starts, again.starts)

    def _encode(self, text: str) -> Tokens:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        if len(ids):
            self.check(int(ids.max()))
        return Tokens(ids, offsets[:, 0], offsets[:, 1])


def _slices(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most a chunk; none is empty."""
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK):
            yield piece[start : start + _CHUNK]
