"""A small session for the tests: two groups, one frozen stage, and content that follows from a number."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgetrain.store import StageLayout, Store, TensorSpec

ROOT = Path(__file__).parents[2]


def trained(name: str) -> StageLayout:
    tensors = (TensorSpec("bias", (5,)), TensorSpec("half", (3, 7), "F16"), TensorSpec("weight", (33, 65)))
    return StageLayout(name, tensors, trained=True)


GROUPS = {"00": [trained("block00.layer00"), trained("block00.stem")], "01": [trained("block01.layer00")]}
CODEBOOK = StageLayout("codebook", (TensorSpec("rows", (10, 6)),), trained=False)


def section(layout: StageLayout, role: str, number: int) -> bytearray:
    """A section's content, reproducible from ``number``; its padding is zero."""
    data = bytearray(layout.section_bytes(role))
    for tensor in layout.tensors_of(role):
        seed = [number, zlib.crc32(f"{layout.name}.{role}.{tensor.name}".encode())]
        begin = layout.offset(role, tensor.name)
        data[begin : begin + tensor.nbytes] = np.random.default_rng(seed).bytes(tensor.nbytes)
    return data


def update(store: Store, group: str, number: int, stages: Sequence[StageLayout] | None = None) -> None:
    """Writes and commits content ``number`` to a group's stages."""
    transaction = store.transaction(group)
    for layout in GROUPS[group] if stages is None else stages:
        for role in layout.roles:
            transaction.write(layout.name, role.name, memoryview(section(layout, role.name, number)))
    transaction.commit({"number": number})


def new_store(path: Path) -> Store:
    """A complete session: frozen stage written, every group committed once, with content 0."""
    store = Store.create(path, GROUPS, [CODEBOOK])
    with store.lock(GROUPS):
        store.write_frozen("codebook", [memoryview(section(CODEBOOK, "frozen", 0))])
        for group in GROUPS:
            update(store, group, 0)
    return store


def reopened(path: Path) -> Store:
    return Store.open(path, GROUPS, [CODEBOOK])


def sound(store: Store) -> bool:
    """Whether ``verify`` finds nothing wrong."""
    return not any(row.problems for row in store.verify().rows)


def content(store: Store, layout: StageLayout, role: str) -> bytearray:
    data = bytearray(layout.section_bytes(role))
    store.read(layout.name, role, memoryview(data))
    return data


def holds(store: Store, group: str, number: int) -> bool:
    """Whether all stages of the group hold content ``number``, in every role."""
    return all(
        content(store, layout, role.name) == section(layout, role.name, number)
        for layout in GROUPS[group]
        for role in layout.roles
    )


def python(*arguments: str) -> list[str]:
    """A command line for ``child.py``; start it in ``ROOT``."""
    return [sys.executable, "-m", "tests.store.child", *arguments]


def run_child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(python(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
