"""Comparing a stage's files with what its manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgetrain.errors import EdgetrainError
from edgetrain.store.slot import Hashed


@dataclass(frozen=True)
class StageCheck:
    """What ``Store.verify`` found for one stage. ``group`` is None for a frozen stage."""

    stage: str
    group: str | None
    slot: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """A row for each stage, and the digest recomputed from the slots; None where one could not be read."""

    rows: tuple[StageCheck, ...]
    digest: str | None


def check_stage(files: Hashed, slot: str, expected: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is wrong with a stage's files, and the hash of each role that could be read from ``slot``."""
    problems: list[str] = []
    for one in files.layout.slots:
        try:
            files.check(one)
        except EdgetrainError as error:
            problems.append(error.message)
    hashes: dict[str, str] = {}
    try:
        for role in expected:
            hashes[role] = files.hash(slot, role)
    except EdgetrainError as error:
        problems.append(error.message)
    for role, value in hashes.items():
        if value != expected[role]:
            problems.append(f"{files.path(slot)}, {role}: SHA-256 is {value}, the manifest says {expected[role]}")
    return tuple(dict.fromkeys(problems)), hashes
