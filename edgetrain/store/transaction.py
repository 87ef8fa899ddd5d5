"""A transaction: takes a commit group from one committed state to the next.

The order that makes a commit atomic: write the idle slots; hash them as they read back; sync them; only then
replace the manifest, durably. Nothing ever writes to a slot that a manifest on the device may call current.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

from edgetrain.store import disk
from edgetrain.store.group import Group, PendingCommit
from edgetrain.store.manifest import Manifest, StageRecord
from edgetrain.store.slot import StageFiles, canonical_json


class Traffic:
    """Bytes of slots read and written so far, on any thread."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self.written_bytes = 0
        self._lock = threading.Lock()

    def add(self, read_bytes: int = 0, written_bytes: int = 0) -> None:
        with self._lock:
            self.read_bytes += read_bytes
            self.written_bytes += written_bytes


class Transaction:
    """One update of a group: writes go to the idle slots and become current all at once, or never.

    Used by one thread at a time. The files written stay open until the end, for the kernel reports a failed
    write to those who had the file open.
    """

    def __init__(self, group: Group, frozen: Mapping[str, str], traffic: Traffic, executor: Executor) -> None:
        self._group = group
        self._frozen = dict(frozen)
        self._traffic = traffic
        self._executor = executor
        self._fds: dict[str, int] = {}
        self._written: dict[tuple[str, str], Extents] = {}
        group.transaction = self

    def write(self, stage: str, role: str, data: memoryview, offset: int = 0) -> None:
        """Writes a part of a role's section, from byte ``offset`` of it, to the stage's idle slot.

        A part may be written again. After the return the memory may be reused.

        Raises:
            DiskError: the disk is full, read-only, or failed.
            ValueError: no such stage or role, a part outside of the section, or the transaction has ended.
        """
        files = self._files(stage)
        data = data.cast("B")
        position = files.position(role, offset, len(data))
        written = self._written.setdefault((stage, role), Extents())
        with disk.disk_errors(files.path(self._idle(stage)), len(data)):
            fd = self._open(stage)
            disk.write_fully(fd, data, position)
            # A part that is written again and again should reach the device once, at the commit.
            if not written.overlap(offset, offset + len(data)):
                disk.start_write_out(fd, position, len(data))
        written.add(offset, offset + len(data))
        self._traffic.add(written_bytes=len(data))

    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        """Fills ``into`` from byte ``offset`` of a role's section: with what this transaction wrote there, else with
        the committed state.

        Raises:
            DiskError, SessionCorrupt: as for ``Store.read``.
            ValueError: as for ``write``; or of the part only some was written, which is neither state; or none was
                and nothing is committed yet.
        """
        files = self._files(stage)
        into = into.cast("B")
        position = files.position(role, offset, len(into))
        overlap = self._written.get((stage, role), Extents()).overlap(offset, offset + len(into))
        if overlap == len(into):
            with disk.disk_errors(files.path(self._idle(stage))):
                disk.read_exactly(self._open(stage), into, position)
        elif overlap == 0 and self._group.manifest is not None:
            record = self._group.manifest.stages[stage]
            files.require(record.slot, role, record.hashes[role])
            files.read(record.slot, role, into, offset)
        else:
            raise ValueError(
                f"stage {stage}, {role}: of the {len(into)} bytes from {offset} the transaction wrote {overlap}"
            )
        self._traffic.add(read_bytes=len(into))

    def commit(self, state: Mapping[str, Any]) -> None:
        """Makes what was written current, with ``state``; returns when it is durable. See ``commit_async``."""
        self.commit_async(state).wait()

    def commit_async(self, state: Mapping[str, Any]) -> PendingCommit:
        """Starts the commit on the store's I/O thread and ends the transaction.

        Stages that were not written keep their slot. Whatever fails, and wherever the process dies, the group is in
        the state before or in this one, entire.

        Args:
            state: becomes the manifest's ``state``; a copy is taken now.

        Raises:
            ValueError: a stage was written in part (or, at the first commit, not at all), ``state`` is nothing
                that JSON can hold, or the transaction has ended. It is still open then in the other cases.
        """
        self._check_open()
        self._check_complete()
        copied = json.loads(canonical_json(dict(state)))
        group = self._group
        group.transaction, group.durable = None, False
        group.pending = PendingCommit(self._executor.submit(self._publish, copied))
        return group.pending

    def discard(self) -> None:
        """Forgets what was written. After a commit began, or a second time, it does nothing."""
        if self._group.transaction is self:
            self._group.transaction = None
            self._close()

    def _publish(self, state: dict[str, Any]) -> None:
        group, before = self._group, self._group.manifest
        try:
            stages = dict(before.stages) if before else {}
            for name in self._fds:
                files, slot = group.stages[name], self._idle(name)
                hashes = {role.name: files.hash(slot, role.name) for role in files.layout.roles}
                files.known.update(((slot, role), value) for role, value in hashes.items())
                stages[name] = StageRecord(slot, hashes)
            # Hashed first and synced then: meanwhile the device works on what was started before.
            for name, fd in self._fds.items():
                with disk.disk_errors(group.stages[name].path(stages[name].slot)):
                    disk.sync_data(fd)
            manifest = Manifest(group.name, before.sequence + 1 if before else 1, stages, self._frozen, state)
            manifest.write(group.manifest_path)
            group.manifest, group.durable = manifest, True
        finally:
            self._close()

    def _check_open(self) -> None:
        if self._group.transaction is not self:
            raise ValueError(f"the transaction on group {self._group.name} has ended")

    def _check_complete(self) -> None:
        first = self._group.manifest is None
        for name in self._group.stages if first else self._fds:
            layout = self._group.stages[name].layout
            for role in layout.roles:
                num_bytes = layout.section_bytes(role.name)
                written = self._written.get((name, role.name), Extents()).overlap(0, num_bytes)
                if written != num_bytes:
                    raise ValueError(f"stage {name}, {role.name}: {written} of {num_bytes} bytes were written")

    def _files(self, stage: str) -> StageFiles:
        self._check_open()
        if stage not in self._group.stages:
            raise ValueError(f"group {self._group.name} has no stage {stage!r}")
        return self._group.stages[stage]

    def _idle(self, stage: str) -> str:
        manifest = self._group.manifest
        return "b" if manifest is not None and manifest.stages[stage].slot == "a" else "a"

    def _open(self, stage: str) -> int:
        if stage not in self._fds:
            self._fds[stage] = os.open(self._group.stages[stage].path(self._idle(stage)), os.O_RDWR)
        return self._fds[stage]

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class Extents:
    """A set of bytes as disjoint ranges in order; ranges that touch are one."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, begin: int, end: int) -> None:
        apart = []
        for one in self._ranges:
            if one[1] < begin or end < one[0]:
                apart.append(one)
            else:
                begin, end = min(begin, one[0]), max(end, one[1])
        self._ranges = sorted([*apart, (begin, end)])

    def overlap(self, begin: int, end: int) -> int:
        """How many of the bytes from ``begin`` to ``end`` are in the set."""
        return sum(max(0, min(end, other) - max(begin, one)) for one, other in self._ranges)
