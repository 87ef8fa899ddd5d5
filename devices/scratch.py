"""The disk tier's file: anonymous, reused, gone when the process is. POSIX only.

The file has no name, so a killed process leaves nothing behind. Released space is handed out
again, first fit: a training step that repeats the last one's allocations does not grow the file.
Nothing here survives a crash or is meant to: no write is synced.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Extent:
    """A range of the scratch file, ``nbytes`` long from ``start``; offsets below count from its start."""

    descriptor: int
    start: int
    nbytes: int

    def read(self, view: memoryview, offset: int = 0) -> None:
        """Fill ``view`` from the file.

        Raises:
            OSError: the system failed to read all of it.
        """
        position = self.start + offset
        while view:
            count = os.preadv(self.descriptor, [view], position)
            if count == 0:
                raise OSError(f"scratch file ends at byte {position}, {len(view)} bytes too early")
            view, position = view[count:], position + count

    def write(self, view: memoryview, offset: int = 0) -> None:
        """Write all of ``view`` to the file.

        Raises:
            OSError: the system failed to write all of it (a full disk, an I/O error).
        """
        position = self.start + offset
        while view:
            count = os.pwrite(self.descriptor, view, position)
            view, position = view[count:], position + count


class Scratch:
    """An unlinked file in ``folder`` and the free list of its space.

    Raises:
        OSError: the folder is missing or not writable.
    """

    def __init__(self, folder: Path) -> None:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed with self)
        self._descriptor = file.fileno()
        weakref.finalize(self, file.close)
        self._file_bytes = 0
        self._free: list[tuple[int, int]] = []  # (start, nbytes), sorted, never adjacent
        # The garbage collector may release space at any moment, in the middle of `allocate` too:
        # what comes back waits in a deque, whose appends are atomic, for the next `allocate`.
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    @property
    def file_bytes(self) -> int:
        """The file's length; it never shrinks."""
        return self._file_bytes

    def allocate(self, nbytes: int) -> Extent:
        """Space for ``nbytes``, page-aligned in the file; its content is undefined.

        Raises:
            OSError: the file cannot grow.
        """
        size = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
        with self._lock:
            self._reclaim()
            for index, (start, free_bytes) in enumerate(self._free):
                if free_bytes >= size:
                    self._free[index : index + 1] = [(start + size, free_bytes - size)] if free_bytes > size else []
                    return Extent(self._descriptor, start, nbytes)
            start = self._file_bytes
            os.ftruncate(self._descriptor, start + size)
            self._file_bytes = start + size
            return Extent(self._descriptor, start, nbytes)

    def free(self, extent: Extent) -> None:
        """Give the extent's space back; the extent must not be used after."""
        size = -(-extent.nbytes // _PAGE_BYTES) * _PAGE_BYTES
        if size:
            self._returned.append((extent.start, size))

    def _reclaim(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for start, size in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._free = merged
