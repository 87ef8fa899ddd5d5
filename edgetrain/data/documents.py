"""Where text comes from: a file, a folder of files, or lines of JSON; each document with the parts that count."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetrain.data.chat import ChatTemplate, Spans
from edgetrain.data.files import reading
from edgetrain.errors import BadInput

_FORMATS = (
    "Give a text file, a folder of .txt files, or a .jsonl file with text, prompt and completion, or messages "
    "in each line."
)
_FIELDS = "text, prompt and completion, or messages"
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Document:
    """One text. ``where`` names its place in errors.

    Attributes:
        pieces: the text, cut anywhere.
        spans: the (start, end) in characters that count for the loss; None: all of it does.
        is_ended: an end-of-text token belongs after it. A chat template ends a conversation itself.
    """

    where: str
    pieces: Iterator[str]
    spans: Spans | None = None
    is_ended: bool = True


@dataclass(frozen=True)
class Source:
    """The files of a data set: one document each, or with lines that are."""

    path: Path
    files: tuple[Path, ...]
    is_jsonl: bool

    @property
    def name(self) -> str:
        return self.path.resolve().stem

    @property
    def identity(self) -> list[tuple[str, int, int]]:
        """Path, size and time stamp of each file."""
        found = []
        for path in self.files:
            with reading(path):
                status = path.stat()
            found.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
        return found

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size, _ in self.identity)

    @property
    def time(self) -> datetime:
        """When the data was last changed."""
        return datetime.fromtimestamp(max(stamp for _, _, stamp in self.identity) / 1e9, UTC)

    def count(self) -> int:
        """The number of documents.

        Raises:
            BadInput: there is none, or a file cannot be read.
        """
        if not self.is_jsonl:
            return len(self.files)
        with reading(self.path), self.path.open("rb") as file:
            num_lines = sum(1 for line in file if line.strip())
        if not num_lines:
            raise BadInput(f"{self.path} holds no line but blank ones", f"Each line is a JSON object with {_FIELDS}.")
        return num_lines

    def documents(self, template: Callable[[], ChatTemplate]) -> Iterator[Document]:
        """All documents, in order. Each is to be used up before the next; ``template`` is called if one needs it.

        Raises:
            BadInput: a file cannot be read, is not UTF-8, or a line of it is no document.
        """
        if self.is_jsonl:
            yield from _lines(self.path, template)
        else:
            for path in self.files:
                yield Document(str(path), _characters(path))


def find_source(source: str) -> Source:
    """The data at the path ``source``.

    Raises:
        BadInput: it names nothing, or there is no text there; an empty file is none.
    """
    if not source:
        raise BadInput("data.source names no text", "Give a path with --data.")
    path = Path(source).expanduser()
    with reading(path):
        if not path.exists():
            raise BadInput(f"There is no data at {path}", _FORMATS)
        if path.is_dir():
            with os.scandir(path) as entries:
                names = sorted(
                    entry.name
                    for entry in entries
                    if entry.name.lower().endswith(".txt") and not entry.name.startswith(".") and entry.is_file()
                )
            if not names:
                raise BadInput(f"{path} holds no .txt files", _FORMATS)
            found = Source(path, tuple(path / name for name in names), False)
        else:
            found = Source(path, (path,), path.suffix.lower() == ".jsonl")
        for file in found.files:
            if not file.stat().st_size:
                raise BadInput(f"{file} is empty", "Remove it, or copy it again.")
    return found


def _characters(path: Path) -> Iterator[str]:
    """The text of a file in pieces. Line ends stay as they are; a byte order mark is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, is_first = 0, True
    with reading(path), path.open("rb") as file:
        while True:
            chunk = file.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                piece = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start) from error
            if piece:
                yield piece.removeprefix("\ufeff") if is_first else piece
                is_first = False
            if not chunk:
                return
            offset += len(chunk)


def _lines(path: Path, template: Callable[[], ChatTemplate]) -> Iterator[Document]:
    offset = 0
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start, f", in line {number}") from error
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.strip():
                yield _document(_parse(text, where), where, template)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is no JSON: {error}", f"Each line is a JSON object with {_FIELDS}.") from error
    if not isinstance(value, dict):
        raise BadInput(f"{where} is no JSON object", f"Each line is a JSON object with {_FIELDS}.")
    return value


def _document(line: dict[str, Any], where: str, template: Callable[[], ChatTemplate]) -> Document:
    kinds = [
        name
        for name, is_there in (
            ("text", "text" in line),
            ("prompt and completion", "prompt" in line and "completion" in line),
            ("messages", "messages" in line),
        )
        if is_there
    ]
    if len(kinds) != 1:
        fields = ", ".join(map(repr, line)) or "no field"
        what = f"both {kinds[0]} and {kinds[1]}" if kinds else f"none of {_FIELDS}: it has {fields}"
        raise BadInput(f"{where} has {what}", "Rename or remove fields: one of the three decides what is trained.")
    if kinds == ["text"]:
        return Document(where, iter([_string(line["text"], "text", where)]))
    if kinds == ["messages"]:
        text, spans = template().conversation(_messages(line["messages"], where), where)
        return Document(where, iter([text]), spans, is_ended=False)
    prompt, completion = (_string(line[name], name, where) for name in ("prompt", "completion"))
    return Document(where, iter([prompt, completion]), [(len(prompt), len(prompt) + len(completion))])


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadInput(f"{where}: messages is no list, but {_kind(value)}", "Write [{role, content}, ...].")
    if not value:
        raise BadInput(f"{where}: messages is empty", "Remove the line.")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise BadInput(f"{where}: message {number} is no object, but {_kind(message)}", "Write {role, content}.")
        for name in ("role", "content"):
            _string(message.get(name), f"{name} of message {number}", where)
    return value


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: {name} is no string, but {_kind(value)}", f"Each line has {_FIELDS}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is no character
        raise BadInput(
            f"{where}: {name} has half of a surrogate pair at character {error.start}",
            "Replace it: it stands for no character.",
        ) from error
    return value


def _kind(value: Any) -> str:
    """The type of a value in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null or missing"}
    return names.get(type(value), "a number")


def _not_utf8(path: Path, offset: int, place: str = "") -> BadInput:
    return BadInput(f"{path} is not UTF-8: byte {offset}{place}", "Convert it, for example with iconv -t UTF-8.")
