"""The system calls under the store: whole or an error, and every error in the user's words.

Callers open with :func:`opened`, which turns each ``OSError`` inside it into an edgetrain error that names the
file. All calls go through the ``os`` module by attribute, where tests make them fail or end the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgetrain.errors import DiskError, EdgetrainError, SessionCorrupt, UsageError
from edgetrain.units import format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ESPIPE}
_ZEROS = bytes(1 << 20)
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def disk_full(path: Path, needed_bytes: int, reason: str = "disk full") -> DiskError:
    """The error for ``path``, with what it needed and what is free."""
    free = format_bytes(free_bytes(path))
    return DiskError(
        f"{reason}: {path} needs {format_bytes(needed_bytes)}, and {free} are free",
        "Free some space, or move the session to a larger disk; then start again: nothing committed is lost.",
    )


def explain(error: OSError, path: Path, needed_bytes: int = 0) -> EdgetrainError:
    """The one place where an ``OSError`` becomes an error of edgetrain."""
    if error.errno in _FULL:
        reason = {errno.EDQUOT: "disk quota used up", errno.EFBIG: "disk full (limit on a file's size)"}
        return disk_full(path, needed_bytes, reason.get(error.errno or 0, "disk full"))
    if error.errno in _READ_ONLY:
        return DiskError(
            f"read-only: {path} cannot be written or opened ({error.strerror})",
            "Training needs a folder that can be written; status, verify, evaluate and export only need to read.",
        )
    if isinstance(error, FileNotFoundError):
        return SessionCorrupt(f"{path} is missing", "Copy the session again, with all of its files.")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return UsageError(f"{path} cannot be a folder: there is a file in its place", "Name another folder.")
    return DiskError(
        f"the disk failed: {path}: {error.strerror or error}",
        "Check the disk and the system's log; what was committed before is kept.",
    )


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns any ``OSError`` inside into the error that :func:`explain` gives, and ``EOFError`` into SessionCorrupt."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, needed_bytes) from error
    except EOFError as error:
        raise SessionCorrupt(f"{path}: {error}", "Take the file from a copy of the session.") from error


@contextmanager
def opened(path: Path, flags: int, needed_bytes: int = 0) -> Iterator[int]:
    """A file descriptor, closed at the end; errors inside are explained."""
    with disk_errors(path, needed_bytes):
        fd = os.open(path, flags, 0o666)
        try:
            yield fd
        finally:
            os.close(fd)


def read_exactly(fd: int, into: memoryview, position: int) -> None:
    """Fills ``into``; EOFError when the file ends before."""
    while into:
        num_read = os.preadv(fd, [into], position)
        if num_read == 0:
            raise EOFError(f"the file ends at byte {position}, {len(into)} bytes too early")
        into, position = into[num_read:], position + num_read


def write_fully(fd: int, data: memoryview, position: int) -> None:
    """Writes all of ``data``; after it returns the memory may be reused."""
    while data:
        num_written = os.pwrite(fd, data, position)
        data, position = data[num_written:], position + num_written


def start_write_out(fd: int, position: int, num_bytes: int) -> None:
    """Asks the kernel to begin writing the range to the device, so that the sync at commit finds little left.

    A hint where the system has no such call; an error of the device is raised all the same.
    """
    if _sync_file_range is None or _sync_file_range(fd, position, num_bytes, _SYNC_FILE_RANGE_WRITE) == 0:
        return
    if (code := ctypes.get_errno()) not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code))


def sync_data(fd: int) -> None:
    """Returns when the file's content is on the device."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """Returns when the folder's entries (files made, renamed) are on the device."""
    with opened(folder, os.O_RDONLY) as fd:
        os.fsync(fd)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing; each is on the device on return."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def will_need(fd: int, position: int, num_bytes: int) -> None:
    """Asks the kernel to read a part of a file into its cache; costs the process no memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, position, num_bytes, os.POSIX_FADV_WILLNEED)


def reserve(fd: int, num_bytes: int) -> None:
    """Makes an empty file ``num_bytes`` long, reading as zeros, its space reserved: no later write inside it
    can find the disk full (unless the file system copies on write)."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        return
    except AttributeError:
        pass
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    for position in range(0, num_bytes, len(_ZEROS)):
        write_fully(fd, memoryview(_ZEROS)[: num_bytes - position], position)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file's whole content at once, durably.

    Write aside, sync, rename, sync the folder: whenever the process or the machine dies, ``path`` has the old
    content or the new. After an error it is unknown which of them it has.
    """
    aside = aside_path(path, os.getpid())
    try:
        with opened(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, len(data)) as fd:
            write_fully(fd, memoryview(data), 0)
            os.fsync(fd)
        with disk_errors(path):
            aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


def aside_path(path: Path, process: int) -> Path:
    """Where a process writes what is to replace ``path``: two of them may, at one time. Nobody reads what a kill
    leaves there."""
    return path.with_name(f"{path.name}.{process}.new")


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write where ``path`` is or would be."""
    while not path.exists():
        path = path.parent
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize
