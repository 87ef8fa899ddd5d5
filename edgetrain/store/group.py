"""A commit group: its manifest in memory and on the device, its lock, and the commit that is under way."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.errors import SessionCorrupt, SessionLocked
from edgetrain.store import disk
from edgetrain.store.manifest import Manifest
from edgetrain.store.slot import StageFiles

if TYPE_CHECKING:
    from edgetrain.store.transaction import Transaction


class PendingCommit:
    """A commit on its way to the disk. Its error is raised once: by ``wait`` or by whatever the store does next."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future
        self._reported = False

    def wait(self) -> None:
        """Returns when the commit is durable, or raises what prevented it; then the state before is current."""
        try:
            self._future.result()
        finally:
            # An interrupt ends the waiting, not the commit.
            self._reported = self._future.done()

    def join(self) -> None:
        """Returns when the commit has ended, well or not."""
        wait([self._future])

    def settle(self, block: bool = True) -> None:
        """``wait``, unless the outcome was reported before; without ``block`` an unfinished commit is left alone."""
        if not self._reported and (block or self._future.done()):
            self.wait()


class Group:
    """The stages that are consistent with each other: one folder with one manifest and one lock.

    ``manifest`` is the last committed one, None before the first commit.
    """

    def __init__(self, folder: Path, stages: Mapping[str, StageFiles]) -> None:
        self.name = folder.name
        self.folder = folder
        self.stages = stages
        self.manifest: Manifest | None = None
        self.manifest_path = folder / "manifest.json"
        self.transaction: Transaction | None = None
        self.pending: PendingCommit | None = None
        self.locked = False
        self.durable = False
        """Whether ``manifest`` is the one on the device for certain; a failed commit leaves that unknown."""

    def committed(self) -> Manifest:
        """The manifest; SessionCorrupt before the first commit."""
        if self.manifest is None:
            raise SessionCorrupt(f"group {self.name} holds no committed state: {self.manifest_path} is missing")
        return self.manifest

    def load(self) -> None:
        """Reads the manifest from the disk and checks that it is of exactly these stages."""
        with disk.disk_errors(self.manifest_path):
            if not self.manifest_path.exists():
                self.manifest = None
                return
        manifest = Manifest.read(self.manifest_path)
        expected = {name: {role.name for role in files.layout.roles} for name, files in self.stages.items()}
        found = {name: set(record.hashes) for name, record in manifest.stages.items()}
        if manifest.group != self.name or found != expected:
            differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            raise SessionCorrupt(
                f"{self.manifest_path} is of another session: group {manifest.group!r}, differing stages {differing}"
            )
        self.manifest = manifest

    def settle(self, block: bool = True) -> None:
        """Raises the error of the last commit, if it has one that nobody was told; with ``block`` waits for it."""
        if self.pending is not None:
            self.pending.settle(block)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps other processes from training the group; the kernel ends the lock with the process.

        At the end a commit under way is waited for and an open transaction is discarded.
        """
        path = self.folder / "lock"
        with disk.disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with disk.disk_errors(path):
                self._take(fd, path)
            try:
                self.locked = True
                for left in self.folder.glob("*.new"):  # by processes that were killed
                    left.unlink()
                self.refresh()
                yield
                self.settle()
            finally:
                if self.transaction is not None:
                    self.transaction.discard()
                if self.pending is not None:
                    self.pending.join()
                self.locked = self.durable = False
        finally:
            os.close(fd)

    def _take(self, fd: int, path: Path) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise SessionLocked(
                f"group {self.name} is being trained by process {holder}: {path} is locked",
                "Wait until it has ended, or stop it (Ctrl-C commits first).",
            ) from None
        # Of fixed length and never truncated: a full disk doesn't keep anyone from taking the lock again.
        disk.write_fully(fd, memoryview(f"{os.getpid():<15}\n".encode()), 0)

    def refresh(self) -> None:
        """Makes sure that the manifest in memory is the one on the device.

        Another process may have committed since it was read; and a manifest may be renamed but its folder not
        synced, after a crash or an error. Were the idle slot written then, a power failure could bring back
        the manifest before, which calls that slot current.
        """
        if not self.durable:
            self.load()
            disk.sync_folder(self.folder)
            self.durable = True
