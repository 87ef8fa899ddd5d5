"""Bytes of files, read at random in bounded memory; compressed files are inflated to disk once."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

from edgetrain.errors import BadInput, DiskError
from edgetrain.units import MIB, format_bytes


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of the system and of gzip while ``path`` is read into ``BadInput``."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(
            f"{path} is no gzip file, or a truncated or damaged one: {error}",
            f"Check it with `gzip -t {path}`; copy or download it again.",
        ) from error
    except OSError as error:
        raise BadInput(
            f"Cannot read {error.filename or path}: {error.strerror or error}",
            "Check that it is there and that you may read it.",
        ) from error


class RandomFile:
    """A file read at any offset. It is not mapped: its pages stay out of the process's memory.

    Raises:
        BadInput: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, num_bytes: int) -> bytes:
        """The ``num_bytes`` bytes from ``offset`` on.

        Raises:
            BadInput: the file ends before, or cannot be read.
        """
        with reading(self.path):
            data = os.pread(self._descriptor, num_bytes, offset)
        if len(data) < num_bytes:
            raise BadInput(
                f"{self.path} is truncated: {num_bytes} bytes wanted at offset {offset}, {len(data)} are there",
                "Copy or download it again.",
            )
        return data


def first_bytes(path: Path, num_bytes: int) -> bytes:
    """The first ``num_bytes`` bytes of a file, or fewer if it ends before; of a .gz file's content.

    Raises:
        BadInput: the file cannot be read.
    """
    with reading(path), gzip.open(path) if is_compressed(path) else path.open("rb") as file:
        return file.read(num_bytes)


def is_compressed(path: Path) -> bool:
    """Whether the file is in gzip format, by its name."""
    return path.suffix == ".gz"


def inflate(path: Path, scratch: Path, num_bytes: int) -> Path:
    """A file in the folder ``scratch`` with the content of the gzip file at ``path``, ``num_bytes`` long.

    The content is streamed, and a complete file of an earlier call is used again as long as the source
    keeps its path, size and time stamp. It appears under its name only when it is complete and durable,
    so any number of processes may do this at the same time, and be killed.

    Raises:
        BadInput: the gzip file is damaged, or its content is shorter or longer than ``num_bytes``.
        DiskError: the content cannot be written; nothing of it is left.
    """
    with reading(path):
        status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    target = scratch / f"{path.stem}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"
    aside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and target.stat().st_size == num_bytes:
            return target
        scratch.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for chunk in _content(path, num_bytes):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        raise DiskError(
            f"Cannot inflate {path} into {scratch}: {error.strerror or error}",
            f"It needs {format_bytes(num_bytes)}: free some space there, or inflate it elsewhere with gunzip.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return target


def _content(path: Path, num_bytes: int) -> Iterator[bytes]:
    """The content of a gzip file in chunks; stops at the first byte too many, so a bomb fills no disk."""
    num_read = 0
    with reading(path), gzip.open(path) as file:
        while chunk := file.read(min(MIB, num_bytes + 1 - num_read)):
            num_read += len(chunk)
            yield chunk
    if num_read != num_bytes:
        found = f"only {num_read}" if num_read < num_bytes else "more"
        raise BadInput(
            f"{path} should hold {num_bytes} bytes by its own header, and holds {found}",
            "Copy or download it again.",
        )
