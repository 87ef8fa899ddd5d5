"""The manifest of a commit group: the one file that says which slots are current, and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetrain.errors import SessionCorrupt
from edgetrain.store import disk
from edgetrain.store.slot import canonical_json

FORMAT = "edgetrain.manifest"
VERSION = 1
MAX_BYTES = 256 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StageRecord:
    """A stage's current slot, ``"a"`` or ``"b"``, and the SHA-256 of each role in it."""

    slot: str
    hashes: dict[str, str]

    def __post_init__(self) -> None:
        if self.slot not in ("a", "b"):
            raise ValueError(f"slot {self.slot!r}")
        _check_hashes(self.hashes)


@dataclass(frozen=True)
class Manifest:
    """A group's committed state.

    ``sequence`` counts the commits from 1. ``frozen`` has the SHA-256 of every frozen stage of the session: what
    this group was trained with. ``state`` is the caller's, any JSON object.
    """

    group: str
    sequence: int
    stages: dict[str, StageRecord]
    frozen: dict[str, str]
    state: dict[str, Any]

    def write(self, path: Path) -> None:
        """Replaces the file, durably (see :func:`disk.replace_file`)."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        disk.replace_file(path, canonical_json({**content, "checksum": _checksum(content)}))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest and checks that it is whole.

        Raises:
            SessionCorrupt: it is missing, damaged, or of another version of the format.
            DiskError: it cannot be read.
        """
        with disk.opened(path, os.O_RDONLY) as fd:
            num_bytes = os.fstat(fd).st_size
            if num_bytes > MAX_BYTES:
                raise SessionCorrupt(f"{path} has {num_bytes} bytes; no manifest has more than {MAX_BYTES}")
            text = bytearray(num_bytes)
            disk.read_exactly(fd, memoryview(text), 0)
        try:
            content = json.loads(text)
            name, version = content.pop("format"), content.pop("version")
            if name != FORMAT or version != VERSION:
                age = "a newer" if isinstance(version, int) and version > VERSION else "another"
                raise SessionCorrupt(
                    f"{path} was written by {age} version of edgetrain: its format is {name} {version}, "
                    f"this one reads {FORMAT} {VERSION}",
                    "Use the edgetrain that wrote the session, or a later one.",
                )
            checksum = content.pop("checksum")
            if checksum != _checksum({"format": name, "version": version, **content}):
                raise ValueError(f"the checksum {checksum} does not fit the content")
            content["stages"] = {stage: StageRecord(**record) for stage, record in content["stages"].items()}
            _check_hashes(content["frozen"])
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SessionCorrupt(
                f"{path} is damaged: {error!r}", "Take this group from a copy of the session."
            ) from error


def combined_digest(stage_hashes: Mapping[str, Mapping[str, str]], digest_roles: Iterable[str]) -> str:
    """The digest of a session: SHA-256 over the JSON list of all ``["STAGE","ROLE","SHA-256"]`` in order.

    Args:
        stage_hashes: for each stage the hash of each of its roles; those not in ``digest_roles`` don't count.
    """
    roles = set(digest_roles)
    rows = sorted(
        [s, role, value] for s, hashes in stage_hashes.items() for role, value in hashes.items() if role in roles
    )
    return hashlib.sha256(canonical_json(rows)).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _check_hashes(hashes: Mapping[str, str]) -> None:
    for name, value in hashes.items():
        if not _SHA256.fullmatch(value):
            raise ValueError(f"{name}: {value!r} is no SHA-256")
