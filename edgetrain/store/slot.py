"""The file of a slot: a valid safetensors file of fixed layout, which any tool can open.

    8 bytes   length of the header, little endian
    header    JSON, padded with spaces until the sections begin at a multiple of 4096
    sections  one a role, each a multiple of 4096 bytes, with the layout of ``StageLayout``

A tensor is called ``ROLE.NAME``. safetensors allows no gap between tensors, so padding is tensors too: U8, called
``pad.0``, ``pad.1``, ... Their content means nothing. ``__metadata__`` holds the format's name and version and the
stage's name. A file is made once, then rewritten in place: it never needs new space and its header never changes.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from edgetrain.errors import SessionCorrupt
from edgetrain.store import disk
from edgetrain.store.layout import ITEM_BYTES, SECTION_ALIGNMENT, StageLayout, align

FORMAT = "edgetrain.slot"
VERSION = "1"
MAX_HEADER_BYTES = 16 << 20
_CHUNK_BYTES = 256 << 10


class Entry(NamedTuple):
    """A tensor of a safetensors file; ``begin`` and ``end`` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file. ``data_start`` is the position of the first tensor byte in the file."""

    metadata: dict[str, str]
    tensors: dict[str, Entry]
    data_start: int


def canonical_json(value: Any) -> bytes:
    """The one way to write a JSON value: keys sorted, no blanks, ASCII.

    Raises:
        ValueError: the value holds a NaN or an infinity, which JSON cannot.
        TypeError: the value holds something else that JSON cannot.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file; memory is only spent on sizes that were checked.

    Raises:
        SessionCorrupt: the file is missing, or is no complete safetensors file; names it and the numbers.
        DiskError: it cannot be read.
    """
    with disk.opened(path, os.O_RDONLY) as fd:
        file_bytes = os.fstat(fd).st_size
        if file_bytes < 8:
            raise SessionCorrupt(f"{path} has {file_bytes} bytes, too few for a header")
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if length > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise SessionCorrupt(
                f"{path}: the header claims {length} bytes, but the file has {file_bytes} "
                f"and no header more than {MAX_HEADER_BYTES}"
            )
        text = bytearray(length)
        disk.read_exactly(fd, memoryview(text), 8)
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        tensors = {name: _entry(**entry) for name, entry in content.items()}
        # Zero-sized tensors share their begin with the next one.
        in_order = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
        for (before, one), (after, other) in pairwise(in_order):
            if one.end != other.begin:
                raise ValueError(f"{before} ends at {one.end}, {after} begins at {other.begin}")
        if in_order and in_order[0][1].begin != 0:
            raise ValueError(f"{in_order[0][0]} begins at {in_order[0][1].begin}, not at 0")
        data_bytes = in_order[-1][1].end if in_order else 0
        if 8 + length + data_bytes != file_bytes:
            raise ValueError(f"the tensors end at byte {8 + length + data_bytes}, the file at {file_bytes}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SessionCorrupt(f"{path}: the header is damaged, or the file is not complete: {error}") from error
    return Header(metadata, tensors, 8 + length)


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    begin, end = data_offsets
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError(f"shape {shape}, offsets {data_offsets}")
    if dtype not in ITEM_BYTES or math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"{dtype} of shape {shape} does not fill the bytes {begin} to {end}")
    return Entry(dtype, tuple(shape), begin, end)


class Hashed(abc.ABC):
    """A stage's bytes by slot and role, compared with the hashes that a manifest has of them."""

    def __init__(self, layout: StageLayout) -> None:
        self.layout = layout
        self.known: dict[tuple[str, str], str] = {}
        """{(slot, role): the hash that this process found there last, or that what it wrote has}."""

    file_bytes = 0
    """Of one slot, in the session."""

    @abc.abstractmethod
    def path(self, slot: str) -> Path:
        """Where the slot is, for messages."""

    @abc.abstractmethod
    def check(self, slot: str) -> None:
        """Raises SessionCorrupt unless the slot is there, is complete and has exactly this layout."""

    @abc.abstractmethod
    def read(self, slot: str, role: str, into: memoryview, offset: int) -> None:
        """Fills ``into`` from byte ``offset`` of a role's section.

        Raises:
            DiskError, SessionCorrupt: the file cannot be read, or ends too early.
            ValueError: there is no such role, or the part is not inside its section.
        """

    @abc.abstractmethod
    def prefetch(self, slot: str, roles: Collection[str]) -> None:
        """Asks the kernel to read the roles into its cache."""

    def check_part(self, role: str, offset: int, num_bytes: int) -> None:
        """Raises ValueError unless the stage has the role, and the part is inside its section."""
        roles = [known.name for known in self.layout.roles]
        if role not in roles:
            raise ValueError(f"stage {self.layout.name} has the roles {roles}, not {role!r}")
        if offset < 0 or offset + num_bytes > self.layout.section_bytes(role):
            raise ValueError(
                f"stage {self.layout.name}, {role}: bytes {offset} to {offset + num_bytes} "
                f"of a section of {self.layout.section_bytes(role)}"
            )

    def require(self, slot: str, role: str, expected: str) -> None:
        """Raises SessionCorrupt unless the role has this hash. What was found before is not read again."""
        if self.known.get((slot, role)) == expected:
            return
        if (found := self.hash(slot, role)) != expected:
            raise SessionCorrupt(
                f"{self.path(slot)}, {role}: SHA-256 is {found}, the manifest says {expected}: the file is damaged, or "
                "is not from the copy of the session that the manifest is from",
                "edgetrain verify SESSION names all such files. Copy the group's folder and its stages together.",
            )
        self.known[slot, role] = found

    def hash(self, slot: str, role: str) -> str:
        """SHA-256 in hex over, for each tensor in name order, ``["NAME","DTYPE",[SHAPE]]``, a newline, its bytes.

        The JSON says how many bytes follow, so no two contents are encoded alike. Padding doesn't count.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        for tensor in self.layout.tensors_of(role):
            digest.update(canonical_json([tensor.name, tensor.dtype, tensor.shape]) + b"\n")
            start = self.layout.offset(role, tensor.name)
            for done in range(0, tensor.nbytes, _CHUNK_BYTES):
                chunk = buffer[: tensor.nbytes - done]
                self.read(slot, role, chunk, start + done)
                digest.update(chunk)
        return digest.hexdigest()


class StageFiles(Hashed):
    """The files of one stage below ``folder``: ``NAME.a`` and ``.b``, or ``.frozen``, all of one layout."""

    def __init__(self, folder: Path, layout: StageLayout) -> None:
        super().__init__(layout)
        self._folder = folder
        tensors = dict(_entries(layout))
        metadata = {"format": FORMAT, "stage": layout.name, "version": VERSION}
        content: dict[str, Any] = {"__metadata__": metadata}
        for name, entry in tensors.items():
            content[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
        text = json.dumps(content, separators=(",", ":")).encode()
        data_start = align(8 + len(text), SECTION_ALIGNMENT)
        self._header = Header(metadata, tensors, data_start)
        self._header_bytes = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
        self._starts = {}
        for role in layout.roles:
            self._starts[role.name] = data_start
            data_start += layout.section_bytes(role.name)
        self.file_bytes = data_start

    def path(self, slot: str) -> Path:
        return self._folder / f"{self.layout.name}.{slot}.safetensors"

    def position(self, role: str, offset: int, num_bytes: int) -> int:
        """The position in the file of a part of a role's section.

        Raises:
            ValueError: the stage has no such role, or the part is not inside its section.
        """
        self.check_part(role, offset, num_bytes)
        return self._starts[role] + offset

    def create(self, slot: str) -> None:
        """Makes the file, all zeros but for its header, and reserves its space. The folder is not synced."""
        with disk.opened(self.path(slot), os.O_RDWR | os.O_CREAT | os.O_TRUNC, self.file_bytes) as fd:
            disk.reserve(fd, self.file_bytes)
            disk.write_fully(fd, memoryview(self._header_bytes), 0)
            os.fsync(fd)

    def check(self, slot: str) -> None:
        """Raises SessionCorrupt unless the file is there, is complete and has exactly this layout."""
        path = self.path(slot)
        header, expected = read_header(path), self._header
        if header.metadata != expected.metadata:
            raise SessionCorrupt(f"{path} says it is {header.metadata}, expected {expected.metadata}")
        for name in sorted(header.tensors.keys() | expected.tensors.keys()):
            if header.tensors.get(name) != expected.tensors.get(name):
                raise SessionCorrupt(
                    f"{path}, {name}: the file has {header.tensors.get(name)}, expected {expected.tensors.get(name)}"
                )
        if header.data_start != expected.data_start:
            raise SessionCorrupt(f"{path}: tensors begin at {header.data_start}, expected {expected.data_start}")

    def read(self, slot: str, role: str, into: memoryview, offset: int) -> None:
        position = self.position(role, offset, len(into))
        with disk.opened(self.path(slot), os.O_RDONLY) as fd:
            disk.read_exactly(fd, into, position)

    def prefetch(self, slot: str, roles: Collection[str]) -> None:
        with disk.opened(self.path(slot), os.O_RDONLY) as fd:
            for role in roles:
                disk.will_need(fd, self._starts[role], self.layout.section_bytes(role))


class Place(NamedTuple):
    """Where a tensor's bytes lie outside of the session: a file, the position in it of the first, and their type."""

    path: Path
    position: int
    dtype: str


class ExternalFiles(Hashed):
    """A frozen stage whose tensors stay in the files that a model came in. ``places`` are by tensor name."""

    def __init__(self, layout: StageLayout, places: Mapping[str, Place]) -> None:
        super().__init__(layout)
        self._places = places

    def path(self, slot: str) -> Path:
        return next(iter(self._places.values())).path

    def check(self, slot: str) -> None:
        for tensor in self.layout.tensors:
            path, position, _ = self._places[tensor.name]
            with disk.disk_errors(path):
                found = path.stat().st_size if path.exists() else None
            if found is None or found < position + tensor.nbytes:
                end = f"{tensor.name} of {self.layout.name} ends at {position + tensor.nbytes}"
                raise SessionCorrupt(
                    f"{path} is missing" if found is None else f"{path} has {found} bytes; {end}",
                    "The session's frozen weights stay in the folder that they were imported from: put it back.",
                )

    def read(self, slot: str, role: str, into: memoryview, offset: int) -> None:
        self.check_part(role, offset, len(into))
        end = offset + len(into)
        for tensor in self.layout.tensors:
            start = self.layout.offset(role, tensor.name)
            first, last = max(offset, start), min(end, start + tensor.nbytes)
            if first < last:
                path, position, _ = self._places[tensor.name]
                with disk.opened(path, os.O_RDONLY) as fd:
                    disk.read_exactly(fd, into[first - offset : last - offset], position + first - start)

    def prefetch(self, slot: str, roles: Collection[str]) -> None:
        for tensor in self.layout.tensors:
            path, position, _ = self._places[tensor.name]
            with disk.opened(path, os.O_RDONLY) as fd:
                disk.will_need(fd, position, tensor.nbytes)


def _entries(layout: StageLayout) -> Iterator[tuple[str, Entry]]:
    """All tensors of the file in the order of their bytes, those that pad included."""
    section_start, num_pads = 0, 0
    for role in layout.roles:
        tensors = layout.tensors_of(role.name)
        section_end = section_start + layout.section_bytes(role.name)
        begins = [section_start + layout.offset(role.name, tensor.name) for tensor in tensors]
        for tensor, begin, limit in zip(tensors, begins, [*begins[1:], section_end], strict=True):
            end = begin + tensor.nbytes
            yield f"{role.name}.{tensor.name}", Entry(tensor.dtype, tensor.shape, begin, end)
            if end < limit:
                yield f"pad.{num_pads}", Entry("U8", (limit - end,), end, limit)
                num_pads += 1
        section_start = section_end
