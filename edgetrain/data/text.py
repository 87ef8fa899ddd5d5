"""Text for training a language model: tokenised once into files, then read at random. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edgetrain.data import chat
from edgetrain.data.documents import Document, Source, find_source
from edgetrain.data.files import reading
from edgetrain.data.tokenizer import TOKENIZER, Tokenizer
from edgetrain.data.tokens import Split, TextDataset, Writer, check_room, read_sizes, sync, write_sizes, writing
from edgetrain.errors import BadInput, UsageError
from edgetrain.randomness import Purpose, Stream, permute

__all__ = ["HELD_OUT", "SPLITS", "TRAIN", "TextDataset", "open_text"]

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)

_FORMAT = 1  # part of the identity: files of another layout are not found
_TOKENIZER_FILES = (TOKENIZER, chat.CONFIG, chat.SPECIAL_TOKENS, chat.TEMPLATE, *chat.MODEL_CONFIGS)


class TextOptions(Protocol):
    """What is asked of ``edgetrain.spec.TextSpec``, which stands above this module."""

    @property
    def source(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def packing(self) -> bool: ...
    @property
    def held_out(self) -> float: ...


def open_text(  # noqa: PLR0917
    spec: TextOptions, split: str, tokenizer_folder: Path, vocab_size: int, scratch: Path, seed: int
) -> TextDataset:
    """One split of the text at ``spec.source``, tokenised by ``tokenizer_folder``/tokenizer.json.

    The source is a text file or a folder of .txt files, UTF-8, a document each; or a .jsonl file, whose lines have
    ``text``, ``prompt`` and ``completion`` (the completion alone counts for the loss), or ``messages`` (what the
    assistant says counts). An end-of-text token follows each document but conversations, which their template ends.

    ``spec.packing``: the documents of a split follow each other and are cut into examples; otherwise each is an
    example, padded. Of N documents, numbered from 0, document i is held out if ``permute(Stream(seed,
    Purpose.SPLIT), i, N)`` is below round(held_out N), which is at least 1; of a single one, the last
    round(held_out T) of its T tokens are, at least 2.

    Both splits are tokenised at the first call, in bounded memory, into a folder in ``scratch`` that later calls find
    by the source (paths, sizes, time stamps), the tokenizer's files and the arguments. It appears under its name only
    when it is complete and durable, so any number of processes may do this at the same time, and be killed.

    Raises:
        BadInput: the source, a document of it or the tokenizer cannot be used; or no token counts for the loss.
        DiskError: the tokens cannot be written into ``scratch``.
        UsageError: there is no such split, or nothing is held out.
    """
    if split not in SPLITS:
        raise UsageError(f"{split!r} is no split of a text", f"Write {' or '.join(SPLITS)}.")
    if split == HELD_OUT and not spec.held_out:
        raise UsageError(
            "data.held_out is 0: no text is held out", "Set it to 0.05, for example, when training begins."
        )
    job = _Job(find_source(spec.source), spec, tokenizer_folder, vocab_size, seed)
    folder = scratch / f"{job.source.name}-{job.identity()}"
    sizes = read_sizes(folder, vocab_size)
    if sizes is None:
        with _locked(folder):
            sizes = read_sizes(folder, vocab_size) or job.make(folder)
    found = sizes[split]
    if not found.num_counted:
        raise BadInput(
            f"{job.source.path}: none of the {found.num_tokens} tokens of the {split} split counts for the loss",
            "Completions and messages of the assistant count; the first token of all does not, having none before it.",
        )
    return TextDataset(
        job.source.name, split, folder, found, length=spec.length, packing=spec.packing, vocab_size=vocab_size
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time tokenises into ``folder``; the others wait for it. The system unlocks after a kill."""
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        with writing(folder.parent):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@dataclass(frozen=True)
class _Job:
    """The tokenising of a text, and all that decides the tokens."""

    source: Source
    spec: TextOptions
    tokenizer_folder: Path
    vocab_size: int
    seed: int

    def identity(self) -> str:
        tokenizer = {}
        for name in _TOKENIZER_FILES:
            path = self.tokenizer_folder / name
            if name == TOKENIZER and not path.is_file():
                raise BadInput(
                    f"{self.tokenizer_folder} has no {name}", "Give the folder of a model and its tokenizer."
                )
            with reading(path):
                if path.is_file():
                    with path.open("rb") as file:
                        tokenizer[name] = hashlib.file_digest(file, "sha256").hexdigest()
        spec = self.spec
        length = None if spec.packing else spec.length  # another length cuts the same tokens
        about = [_FORMAT, self.source.identity, tokenizer, length, spec.packing, spec.held_out]
        return hashlib.sha256(json.dumps([*about, self.vocab_size, self.seed]).encode()).hexdigest()[:16]

    def make(self, folder: Path) -> dict[str, Split]:
        """Writes both splits into ``folder``, whose lock is held."""
        tokenizer = Tokenizer(self.tokenizer_folder, self.vocab_size)
        aside = folder.with_name(f"{folder.name}.part")
        for old in (aside, folder):  # what a kill left, or damage
            shutil.rmtree(old, ignore_errors=True)
        try:
            with writing(aside):
                aside.mkdir()
            sizes = self._tokenise(aside, tokenizer)
            with writing(aside):
                write_sizes(aside, sizes)
                for path in (*aside.iterdir(), aside):
                    sync(path)
                aside.replace(folder)
                sync(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return sizes

    def _tokenise(self, folder: Path, tokenizer: Tokenizer) -> dict[str, Split]:
        source, spec, num_documents = self.source, self.spec, self.source.count()
        num_held_out = 0
        if spec.held_out and num_documents > 1:
            num_held_out = min(max(1, round(num_documents * spec.held_out)), num_documents - 1)
        stream = Stream(self.seed, Purpose.SPLIT)
        template = functools.cache(lambda: chat.ChatTemplate(self.tokenizer_folder, source.time))
        end_of_text = functools.cache(lambda: self._end_of_text(tokenizer))
        check_room(folder, source.num_bytes, self.vocab_size)
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(Writer(folder, split, self.vocab_size, spec.packing))
                for split in ((TRAIN, HELD_OUT) if num_held_out else (TRAIN,))
            }
            for number, document in enumerate(source.documents(template)):
                num_read = 0
                is_held_out = num_held_out and permute(stream, np.array([number]), num_documents)[0] < num_held_out
                writer = writers[HELD_OUT if is_held_out else TRAIN]
                for tokens in tokenizer.encode(document.pieces):
                    writer.add(tokens.ids, tokens.inside(document.spans))
                    num_read += len(tokens.ids)
                if document.is_ended:
                    writer.add(np.array([end_of_text()]), np.ones(1, bool))
                num_tokens, num_counted = writer.end_document()
                if num_read == 0:
                    raise BadInput(f"{document.where} is empty", "Remove it.")
                _check_example(document, num_tokens, num_counted, None if spec.packing else spec.length)
                if spec.held_out and num_documents == 1 and document.spans is not None:
                    raise BadInput(
                        f"{document.where} is the only example: none can be held out",
                        "Add others, or set data.held_out = 0.",
                    )
        sizes = {split: writer.sizes for split, writer in writers.items()}
        if spec.held_out and num_documents == 1:
            return _split_tokens(folder, source, sizes[TRAIN], spec.held_out)
        return sizes

    def _end_of_text(self, tokenizer: Tokenizer) -> int:
        number = chat.end_of_text(self.tokenizer_folder, tokenizer.token_to_id)
        tokenizer.check(number, "the end of a text")
        return number


def _check_example(document: Document, num_tokens: int, num_counted: int, length: int | None) -> None:
    """``length``: None where long documents are cut."""
    if length is not None and num_tokens > length + 1:
        raise BadInput(
            f"{document.where} has {num_tokens} tokens; an example has at most {length + 1}, one more than data.length",
            f"Set data.length = {num_tokens - 1}, or data.packing = true, which cuts long documents.",
        )
    if not num_counted:
        raise BadInput(
            f"{document.where}: none of its {num_tokens} tokens counts for the loss",
            "Remove it: completions and messages of the assistant count, the first token of an example does not.",
        )


def _split_tokens(folder: Path, source: Source, whole: Split, held_out: float) -> dict[str, Split]:
    """The splits of a single document: its last tokens are held out."""
    num_held_out = max(2, round(whole.num_tokens * held_out))
    num_train = whole.num_tokens - num_held_out
    if num_train < 2:
        raise BadInput(
            f"{source.path} has {whole.num_tokens} tokens: too few to hold {num_held_out} out",
            "Add text, or set data.held_out = 0.",
        )
    sizes = {}
    for split, first, num_tokens in ((TRAIN, 0, num_train), (HELD_OUT, num_train, num_held_out)):
        with writing(folder):
            (folder / f"{split}.starts").write_bytes(np.array([first, first + num_tokens], np.int64).tobytes())
        sizes[split] = Split(TRAIN, first, num_tokens, 1, num_tokens - 1)
    return sizes
