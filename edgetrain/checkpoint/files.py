"""The small files of a model folder: nothing outside the folder is read, and nothing of unexpected size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgetrain.errors import BadInput
from edgetrain.store import disk
from edgetrain.units import MIB

CONFIG = "config.json"
TOKENIZER_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
"""What a folder needs beside its weights, as far as it has it."""

MAX_JSON_BYTES = 16 * MIB
MAX_FILE_BYTES = 256 * MIB
_CHUNK_BYTES = MIB


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of the system while ``path`` is read into BadInput."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror or error}", "Check that it is there and that you may read it."
        ) from error


def file_inside(folder: Path, name: str) -> Path:
    """The path of an ordinary file of the folder; it need not exist.

    A link may lead to another place in the folder, or, as in the Hugging Face cache (snapshots/REVISION/ beside
    blobs/), into the cache's own blobs. Elsewhere it would bring a file of this machine into the model and its exports.

    Raises:
        BadInput: it lies outside the folder, or is no ordinary file.
    """
    path = folder / name
    with reading(path):
        try:
            real, root = path.resolve(), folder.resolve()
        except (RuntimeError, ValueError) as error:  # links in a circle; a null character
            raise BadInput(f"{folder}: {name!r} names no file: {error}") from error
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        if Path(name).is_absolute() or ".." in Path(name).parts or not any(map(real.is_relative_to, allowed)):
            raise BadInput(
                f"{folder}: {name!r} lies outside the folder, at {real}", "Copy the file itself into the folder."
            )
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise BadInput(f"{path} is no ordinary file")
    return path


def read_object(folder: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of the folder.

    Raises:
        BadInput: the file is missing, too large, or holds no JSON object.
    """
    path = file_inside(folder, name)
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise BadInput(f"{path} has {size} bytes, and no {name} more than {max_bytes}")
        text = file.read(size)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}", "Copy or download it again.") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def present(folder: Path, names: tuple[str, ...] = TOKENIZER_FILES) -> dict[str, int]:
    """{name: bytes} of those of the files that the folder has.

    Raises:
        BadInput: one lies outside the folder, is no ordinary file, or is larger than any such file.
    """
    sizes = {}
    for name in names:
        path = file_inside(folder, name)
        with reading(path):
            if not path.exists():
                continue
            sizes[name] = path.stat().st_size
        if sizes[name] > MAX_FILE_BYTES:
            raise BadInput(f"{path} has {sizes[name]} bytes, more than the {MAX_FILE_BYTES} that are read")
    return sizes


def copy_file(path: Path, to: Path) -> None:
    """Copies a file whole and durably, or not at all; the folder of ``to`` is not synced.

    Raises:
        BadInput: it cannot be read, or is larger than any file but weights should be.
        DiskError: the disk is full, read-only, or failed.
    """
    aside = disk.aside_path(to, os.getpid())
    try:
        with reading(path):
            source = os.open(path, os.O_RDONLY)
        try:
            done = 0
            with disk.opened(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.fstat(source).st_size) as target:
                while True:
                    with reading(path):
                        data = os.pread(source, _CHUNK_BYTES, done)
                    if not data:
                        break
                    disk.write_fully(target, memoryview(data), done)
                    done += len(data)
                    if done > MAX_FILE_BYTES:
                        raise BadInput(f"{path} has more than the {MAX_FILE_BYTES} bytes that are read")
                os.fsync(target)
        finally:
            os.close(source)
        with disk.disk_errors(to):
            aside.replace(to)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def copy_tokenizer(folder: Path, to: Path) -> list[Path]:
    """Copies those of TOKENIZER_FILES that the folder has into the folder ``to``, each durably; returns the copies.

    Raises:
        BadInput: one cannot be read, is too large, or lies outside the folder.
        DiskError: the disk is full, read-only, or failed.
    """
    copies = []
    for name in present(folder):
        copy_file(folder / name, to / name)
        copies.append(to / name)
    disk.sync_folder(to)
    return copies
