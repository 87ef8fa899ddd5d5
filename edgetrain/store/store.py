"""The store: a session's tensors on disk, durable and consistent per commit group.

    stages/NAME.{a,b,frozen}.safetensors     the slots (see ``slot.py``)
    groups/GROUP/{manifest.json,lock}        which slots are current (see ``manifest.py``), and who trains

Reading (open, read, digest, verify) opens no file for writing and works in a read-only folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from edgetrain.errors import SessionCorrupt
from edgetrain.store import disk
from edgetrain.store.group import Group
from edgetrain.store.layout import FROZEN_ROLES, TRAINED_ROLES, StageLayout
from edgetrain.store.manifest import Manifest, combined_digest
from edgetrain.store.slot import ExternalFiles, Hashed, Place, StageFiles
from edgetrain.store.transaction import Traffic, Transaction
from edgetrain.store.verify import StageCheck, Verification, check_stage

External = Mapping[str, Mapping[str, Place]]
"""{frozen stage: {tensor: where it stays, outside of the session}}."""

_DIGEST_ROLES = [role.name for role in (*TRAINED_ROLES, *FROZEN_ROLES) if role.in_digest]


class Store:
    """The tensors of one session. Made by ``create`` or ``open``.

    One process writes a group at a time, under its lock; any number may read. Inside a process, a read of a stage must
    have ended before the second next transaction on its group writes: that one reuses the slot being read.
    """

    def __init__(
        self, path: Path, groups: Mapping[str, Sequence[StageLayout]], frozen: Sequence[StageLayout], external: External
    ) -> None:
        layouts = [layout for stages in groups.values() for layout in stages]
        names = [layout.name for layout in (*layouts, *frozen)]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have distinct names: {sorted(names)}")
        if not all(layout.trained for layout in layouts) or any(layout.trained for layout in frozen):
            raise ValueError("the stages of groups are trained, those in 'frozen' are not")
        self.path = path
        self._groups: dict[str, Group] = {}
        self._group_of: dict[str, Group] = {}
        for name, stages in groups.items():
            files = {layout.name: StageFiles(path / "stages", layout) for layout in stages}
            group = self._groups[name] = Group(path / "groups" / name, files)
            self._group_of.update(dict.fromkeys(files, group))
        self._frozen: dict[str, Hashed] = {
            layout.name: ExternalFiles(layout, external[layout.name])
            if layout.name in external
            else StageFiles(path / "stages", layout)
            for layout in frozen
        }
        self._frozen_hashes: dict[str, str] = {}
        self._traffic = Traffic()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")

    @classmethod
    def create(
        cls,
        path: Path,
        groups: Mapping[str, Sequence[StageLayout]],
        frozen: Sequence[StageLayout] = (),
        external: External = MappingProxyType({}),
    ) -> Store:
        """Makes all files below ``path``, with their space reserved. ``external`` tells for which of the frozen stages
        none is made, and where their tensors stay.

        The store is usable when, under the locks, the frozen stages were written and every group had its first
        commit. Until the first of these, ``create`` may be called again, say after a crash.

        Raises:
            DiskError: not enough space (checked before anything is made), or the disk is read-only or failed.
            SessionLocked: another process is training here.
            ValueError: a group here holds committed state, or the layouts contradict each other.
        """
        store = cls(path, groups, frozen, external)
        own = (one for one in store._all_files() if isinstance(one, StageFiles))
        files = [(one, slot) for one in own for slot in one.layout.slots]
        with disk.disk_errors(path):
            there = [one.path(slot).stat().st_blocks * 512 for one, slot in files if one.path(slot).exists()]
            needed = sum(one.file_bytes for one, _ in files) - sum(there)
            if needed > disk.free_bytes(path):
                raise disk.disk_full(path, needed)
            for folder in (path / "stages", *(group.folder for group in store._groups.values())):
                folder.mkdir(parents=True, exist_ok=True)
        with store.lock(store._groups):
            if committed := [name for name in groups if name not in store.uncommitted]:
                raise ValueError(f"{path} has committed state in the groups {committed}")
            for one, slot in files:
                one.create(slot)
            for folder in (path / "stages", path / "groups", path, path.parent):
                disk.sync_folder(folder)
        return store

    @classmethod
    def open(
        cls,
        path: Path,
        groups: Mapping[str, Sequence[StageLayout]],
        frozen: Sequence[StageLayout] = (),
        external: External = MappingProxyType({}),
    ) -> Store:
        """Opens what ``create`` made, for reading and, under locks, for training.

        Raises:
            SessionCorrupt: a file is missing or damaged, has another layout, or is of another format version; or
                groups were trained with different frozen stages. Groups without a manifest are ``uncommitted``.
            DiskError: a file cannot be read.
        """
        store = cls(path, groups, frozen, external)
        for files in store._all_files():
            for slot in files.layout.slots:
                files.check(slot)
        for group in store._groups.values():
            group.load()
        store._collect_frozen()
        return store

    @property
    def uncommitted(self) -> tuple[str, ...]:
        """The groups that have no committed state: their creation was not finished, or their manifest is lost."""
        return tuple(name for name, group in self._groups.items() if group.manifest is None)

    @property
    def bytes_read(self) -> int:
        """Bytes of slots that callers read so far (what a commit or ``verify`` reads back doesn't count)."""
        return self._traffic.read_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes written to slots so far (manifests and headers don't count)."""
        return self._traffic.written_bytes

    @contextmanager
    def lock(self, groups: Iterable[str]) -> Iterator[None]:
        """Holds the locks of some groups; what another process committed in them before is then seen.

        The I/O thread runs from here on: a limit on memory that is drawn later leaves no room for its stack.

        Raises:
            SessionLocked: another process holds one; names the group and the process.
            DiskError: the folder is read-only.
        """
        with ExitStack() as held:
            for name in sorted(groups):
                held.enter_context(self._groups[name].hold())
            self._collect_frozen()
            self._executor.submit(int).result()
            yield

    @property
    def trained_layouts(self) -> list[StageLayout]:
        return [files.layout for group in self._groups.values() for files in group.stages.values()]

    @property
    def frozen_layouts(self) -> list[StageLayout]:
        return [files.layout for files in self._frozen.values()]

    @property
    def num_bytes(self) -> int:
        """What all slots take on disk."""
        return sum(files.file_bytes * len(files.layout.slots) for files in self._all_files())

    def manifest(self, group: str) -> Manifest:
        """The last committed state of a group; SessionCorrupt if it has none."""
        return self._groups[group].committed()

    def read(self, stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        """Fills ``into`` with the committed bytes of a role's section, from byte ``offset`` of it.

        Waits for a commit of the stage's group that is under way. Unless this process wrote the slot itself, the first
        read of a role compares the whole of it with the manifest's hash.

        Raises:
            DiskError, SessionCorrupt: the file cannot be read, ends too early or has another hash, or the group has no
                committed state.
            ValueError: there is no such role, or the part is not inside its section.
        """
        if stage in self._group_of:
            self._group_of[stage].settle()
        files, _ = self._current(stage)
        into = into.cast("B")
        files.check_part(role, offset, len(into))
        files.read(self._require(stage, role), role, into, offset)
        self._traffic.add(read_bytes=len(into))

    def write_frozen(self, stage: str, parts: Iterable[memoryview]) -> None:
        """Writes a frozen stage's whole section, in order, durably; of an external one, whose ``parts`` are none, takes
        the hash. Only under all locks, before the first commit of any group.

        Raises:
            DiskError: the disk is full, read-only, or failed.
            ValueError: it is too late for that, a lock is not held, or ``parts`` are not the whole section.
        """
        self._require_locks(self._groups)
        if len(self.uncommitted) != len(self._groups):
            raise ValueError(f"stage {stage} is frozen: groups were trained with it")
        files = self._frozen[stage]
        if isinstance(files, StageFiles):
            num_bytes, done = files.layout.section_bytes("frozen"), 0
            with disk.opened(files.path("frozen"), os.O_RDWR, num_bytes) as fd:
                for part in parts:
                    data = part.cast("B")
                    disk.write_fully(fd, data, files.position("frozen", done, len(data)))
                    done += len(data)
                disk.sync_data(fd)
            if done != num_bytes:
                raise ValueError(f"stage {stage}: {done} of {num_bytes} bytes")
            self._traffic.add(written_bytes=done)
        self._frozen_hashes[stage] = files.hash("frozen", "frozen")

    def transaction(self, group: str) -> Transaction:
        """Begins an update of a group, after its last commit has ended.

        Raises:
            EdgetrainError: what made an earlier ``commit_async`` of any group fail, if nobody was told yet.
            ValueError: the group's lock is not held, it has an open transaction, or frozen stages are not written.
        """
        self._require_locks([group])
        if self._groups[group].transaction is not None:
            raise ValueError(f"group {group} has an open transaction")
        if missing := sorted(self._frozen.keys() - self._frozen_hashes.keys()):
            raise ValueError(f"the frozen stages {missing} must be written first")
        for one in self._groups.values():
            one.settle(block=one.name == group)
        self._groups[group].refresh()
        return Transaction(self._groups[group], self._frozen_hashes, self._traffic, self._executor)

    def flush(self) -> None:
        """Waits for all commits under way; raises the first error that nobody was told yet."""
        for group in self._groups.values():
            group.settle()

    def prefetch(self, stages: Iterable[str]) -> None:
        """Asks the kernel to read the stages' current slots into its cache."""
        for stage in stages:
            files, slot = self._current(stage)
            files.prefetch(slot, [role.name for role in files.layout.roles])

    def digest(self) -> str:
        """The session's digest from the manifests alone (see ``combined_digest``); SessionCorrupt without one."""
        hashes: dict[str, Mapping[str, str]] = {name: {"frozen": value} for name, value in self._frozen_hashes.items()}
        for name in self._groups:
            hashes.update({stage: record.hashes for stage, record in self.manifest(name).stages.items()})
        return combined_digest(hashes, _DIGEST_ROLES)

    def verify(self) -> Verification:
        """Reads and hashes everything again, and compares it with the manifests.

        Damage inside padding is not noticed: it means nothing. Other processes may train meanwhile.

        Raises:
            SessionCorrupt: a manifest is missing or damaged.
        """
        self.flush()
        rows: list[StageCheck] = []
        hashes: dict[str, dict[str, str]] = {}
        for name, files in self._frozen.items():
            problems, hashes[name] = check_stage(files, "frozen", {"frozen": self._frozen_hashes.get(name, "none")})
            rows.append(StageCheck(name, None, "frozen", problems))
        for group in self._groups.values():
            while True:
                group.load()
                manifest = group.committed()
                found = {}
                for name, record in manifest.stages.items():
                    problems, hashes[name] = check_stage(group.stages[name], record.slot, record.hashes)
                    found[name] = StageCheck(name, group.name, record.slot, problems)
                # What differs may have been overwritten by two commits of a process that trains.
                if not any(row.problems for row in found.values()) or Manifest.read(group.manifest_path) == manifest:
                    break
            rows += found.values()
        complete = all(len(hashes[files.layout.name]) == len(files.layout.roles) for files in self._all_files())
        digest = combined_digest(hashes, _DIGEST_ROLES) if complete else None
        return Verification(tuple(sorted(rows, key=lambda row: row.stage)), digest)

    def _all_files(self) -> list[Hashed]:
        return [*self._frozen.values(), *(one for group in self._groups.values() for one in group.stages.values())]

    def _current(self, stage: str) -> tuple[Hashed, str]:
        if stage in self._frozen:
            return self._frozen[stage], "frozen"
        group = self._group_of[stage]
        return group.stages[stage], group.committed().stages[stage].slot

    def _require(self, stage: str, role: str) -> str:
        """The current slot of a stage; SessionCorrupt unless the role has there the hash that the manifest says."""
        if stage in self._frozen:
            self._frozen[stage].require("frozen", role, self._frozen_hashes.get(stage, "none"))
            return "frozen"
        group = self._group_of[stage]
        while True:
            manifest = group.committed()
            record = manifest.stages[stage]
            try:
                group.stages[stage].require(record.slot, role, record.hashes[role])
                return record.slot
            except SessionCorrupt:
                if group.locked:
                    raise
                group.load()  # what differs may have been overwritten by two commits of a process that trains
                if group.manifest == manifest:
                    raise

    def _require_locks(self, groups: Iterable[str]) -> None:
        if unlocked := [name for name in groups if not self._groups[name].locked]:
            raise ValueError(f"the locks of the groups {unlocked} are not held")

    def _collect_frozen(self) -> None:
        """Takes the frozen stages' hashes from the manifests, which must agree on them."""
        manifests = [group.manifest for group in self._groups.values() if group.manifest is not None]
        for manifest in manifests:
            if manifest.frozen != manifests[0].frozen or manifest.frozen.keys() != self._frozen.keys():
                raise SessionCorrupt(
                    f"{self.path}: the groups {manifests[0].group} and {manifest.group} were trained with different "
                    f"frozen stages, or with others than {sorted(self._frozen)}",
                    "Groups can be put together only if their sessions were copies of one.",
                )
        if manifests:
            self._frozen_hashes = dict(manifests[0].frozen)
