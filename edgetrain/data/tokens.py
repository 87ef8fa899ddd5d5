"""The files of a tokenised text: written once, read at random in bounded memory. No torch here.

A split is SPLIT.tokens (uint16, or uint32 for vocabularies beyond 65536), SPLIT.flags (a bit for each token: whether it
counts when it is predicted), SPLIT.starts (int64: where each document begins, and the end); sizes.json has the lengths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.files import RandomFile
from edgetrain.errors import DiskError
from edgetrain.units import format_bytes

_SIZES = "sizes.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Split:
    """Tokens ``first .. first + num_tokens - 1`` of the files called ``stem``. ``num_counted``: targets of weight 1."""

    stem: str
    first: int
    num_tokens: int
    num_documents: int
    num_counted: int


class TextDataset:
    """One split of a text data set, as examples of ``length`` tokens. Made by ``edgetrain.data.text.open_text``.

    Attributes:
        name: what the data set is called in reports.
        split: ``"train"`` or ``"held_out"``.
        num_examples: length of the split, at least 1.
        length: tokens of an example.
        vocab_size: every token is below it.
    """

    def __init__(
        self, name: str, split: str, folder: Path, sizes: Split, *, length: int, packing: bool, vocab_size: int
    ) -> None:
        self.name = name
        self.split = split
        self.length = length
        self.vocab_size = vocab_size
        # Every token of a packed split but its first is predicted once.
        self.num_examples = -(-(sizes.num_tokens - 1) // length) if packing else sizes.num_documents
        self._sizes = sizes
        self._dtype = token_type(vocab_size)
        self._tokens = RandomFile(folder / f"{sizes.stem}.tokens")
        self._flags = RandomFile(folder / f"{sizes.stem}.flags")
        self._starts = None if packing else RandomFile(folder / f"{split}.starts")

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Inputs, targets and weights, each ``(n, length)``, of the examples at ``indices``, in their order.

        The target of a position is the next token; its weight is 1 where it counts for the loss and 0 elsewhere: in
        prompts, and in the padding with zeros at the end of a row. The arrays are the caller's to change. Memory: O(n).
        Safe to call from several threads.

        Raises:
            BadInput: a file can no longer be read.
            IndexError: there is no such example.
        """
        shape = (len(indices), self.length)
        inputs, targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for row in np.argsort(indices, kind="stable"):  # in the order of the file
            first, count = self._place(int(indices[row]))
            tokens = np.frombuffer(
                self._tokens.read(first * self._dtype.itemsize, count * self._dtype.itemsize), self._dtype
            )
            bits = np.frombuffer(self._flags.read(first // 8, (first + count + 7) // 8 - first // 8), np.uint8)
            inputs[row, : count - 1] = tokens[:-1]
            targets[row, : count - 1] = tokens[1:]
            weights[row, : count - 1] = np.unpackbits(bits)[first % 8 + 1 : first % 8 + count]
        return inputs, targets, weights

    def _place(self, index: int) -> tuple[int, int]:
        """Where the tokens of an example begin, and how many there are: one more than are inputs."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        if self._starts is not None:
            first, end = np.frombuffer(self._starts.read(8 * index, 16), np.int64).tolist()
            return first, end - first
        skipped = index * self.length
        return self._sizes.first + skipped, min(self.length + 1, self._sizes.num_tokens - skipped)


def token_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def read_sizes(folder: Path, vocab_size: int) -> dict[str, Split] | None:
    """What the folder holds; None if it is not there, or not whole."""
    try:
        sizes = {split: Split(**values) for split, values in json.loads((folder / _SIZES).read_bytes()).items()}
        for split, found in sizes.items():
            end = found.first + found.num_tokens
            for name, num_bytes in (
                (f"{found.stem}.tokens", end * token_type(vocab_size).itemsize),
                (f"{found.stem}.flags", (end + 7) // 8),
                (f"{split}.starts", 8 * (found.num_documents + 1)),
            ):
                if (folder / name).stat().st_size < num_bytes:
                    return None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return sizes


def write_sizes(folder: Path, sizes: Mapping[str, Split]) -> None:
    text = json.dumps({split: dataclasses.asdict(values) for split, values in sizes.items()}, indent=1)
    (folder / _SIZES).write_text(text + "\n")


class Writer:
    """Appends to the three files of a split.

    Raises:
        DiskError: from any method, when the files cannot be written.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, packing: bool) -> None:
        self._folder, self._split = folder, split
        self._dtype = token_type(vocab_size)
        self._packing = packing
        self._files: dict[str, BinaryIO] = {}
        self._bits = np.zeros(0, bool)  # fewer than 8, which fill no byte yet
        self._num_tokens, self._num_counted, self._num_documents = 0, 0, 0
        self._before = (0, 0)  # tokens, and those that count, when the document began

    def __enter__(self) -> Writer:
        with writing(self._folder):
            for kind in ("tokens", "flags", "starts"):
                self._files[kind] = (self._folder / f"{self._split}.{kind}").open("wb")
        self._write("starts", np.zeros(1, np.int64).tobytes())
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.callback(self._close, file, kind is not None)
            if kind is None:
                self._write("flags", np.packbits(self._bits).tobytes())

    def add(self, ids: NDArray[np.int64], counts: NDArray[np.bool_]) -> None:
        """More tokens of the document, and which of them count when they are predicted."""
        # The first token of an example without packing, or of all with it, has none before it that predicts it.
        num_first = int(self._num_tokens == (0 if self._packing else self._before[0]))
        self._num_counted += int(counts[num_first:].sum())
        self._num_tokens += len(ids)
        self._write("tokens", ids.astype(self._dtype).tobytes())
        bits = np.concatenate([self._bits, counts])
        whole = len(bits) // 8 * 8
        self._write("flags", np.packbits(bits[:whole]).tobytes())
        self._bits = bits[whole:]

    def end_document(self) -> tuple[int, int]:
        """The number of the document's tokens, and of those that count."""
        self._write("starts", np.array([self._num_tokens], np.int64).tobytes())
        self._num_documents += 1
        before, self._before = self._before, (self._num_tokens, self._num_counted)
        return self._num_tokens - before[0], self._num_counted - before[1]

    @property
    def sizes(self) -> Split:
        return Split(self._split, 0, self._num_tokens, self._num_documents, self._num_counted)

    def _write(self, kind: str, data: bytes) -> None:
        with writing(self._folder):
            self._files[kind].write(data)

    def _close(self, file: BinaryIO, failed: bool) -> None:
        """Closing writes what is buffered. After an error that is beside the point, and may fail as well."""
        with contextlib.suppress(OSError) if failed else writing(self._folder):
            file.close()


def check_room(folder: Path, source_bytes: int, vocab_size: int) -> None:
    """Refuses early a text of ``source_bytes`` whose tokens have no room in ``folder``.

    A token of a model's own language is some 4 bytes of text; half of what that makes is asked for.

    Raises:
        DiskError: there is too little space.
    """
    needed_bytes = source_bytes // 4 * token_type(vocab_size).itemsize
    with writing(folder):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes // 2:
        raise DiskError(
            f"There is no room for the tokens of the text in {folder.parent}: some {format_bytes(needed_bytes)} are "
            f"needed, {format_bytes(free_bytes)} are free",
            "Free some space there, or use a larger disk.",
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the errors of the system while tokens are written into ``DiskError``."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"Cannot write the tokens of the text into {path}: {error.strerror or error}{_room(path, error)}",
            "Free some space there, or check that the folder can be written.",
        ) from error


def _room(path: Path, error: OSError) -> str:
    """What is written and what is free, for an error that says the disk is full."""
    if error.errno not in _FULL:
        return ""
    with contextlib.suppress(OSError):
        written_bytes = sum(file.stat().st_size for file in path.iterdir())
        free_bytes = shutil.disk_usage(path).free
        return f"; more than {format_bytes(written_bytes)} are needed, {format_bytes(free_bytes)} are free"
    return ""


def sync(path: Path) -> None:
    """Returns when a file or folder is on the device. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
