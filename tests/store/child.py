"""What the tests run in processes of their own: ``python -m tests.store.child COMMAND SESSION [NUMBER]``."""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetrain.errors import EdgetrainError
from edgetrain.store import Store
from tests.store.common import CODEBOOK, GROUPS, holds, new_store, reopened, sound, update

CRASHED = 77
WATCHED = ("open", "posix_fallocate", "pwrite", "fdatasync", "fsync", "replace")


def die_at(last: int) -> None:
    """Ends the process at the call number ``last`` of those that change files; a write is done by half before."""
    numbers = itertools.count()

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == last:
                if name == "pwrite":
                    call(args[0], args[1][: len(args[1]) // 2], args[2])
                os._exit(CRASHED)
            return call(*args, **kwargs)

        return watched

    for name in WATCHED:
        setattr(os, name, watch(name, getattr(os, name)))


def crash_in_update(path: Path, last: int) -> None:
    store = reopened(path)
    die_at(last)
    with store.lock(["00"]):
        update(store, "00", 1)


def crash_in_creation(path: Path, last: int) -> None:
    die_at(last)
    new_store(path)


def commit_for_ever(path: Path) -> None:
    store = reopened(path)
    with store.lock(GROUPS):
        for number in itertools.count(store.manifest("00").state["number"] + 1):
            for group in GROUPS:
                update(store, group, number)
            print(number, flush=True)


def exit_with(error: EdgetrainError) -> None:
    print(error)
    sys.exit(error.exit_code)


def file_limit(path: Path) -> None:
    """The system refuses to write past the first half of a slot: as on a full disk, but for one process."""
    store = reopened(path)
    limit = (path / "stages" / "block00.stem.b.safetensors").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with store.lock(["00"]):
            update(store, "00", 1)
    except EdgetrainError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        # The same process can go on when there is room again.
        assert holds(store, "00", 0)
        with store.lock(["00"]):
            update(store, "00", 2)
        assert holds(store, "00", 2)
        exit_with(error)


def full_disk(path: Path) -> None:
    """On a small file system: no room for the session; then room for all but the next manifest."""
    (path / "ballast").write_bytes(bytes(200 << 10))
    try:
        Store.create(path / "session", GROUPS, [CODEBOOK])
    except EdgetrainError as error:
        print(error)
    assert not (path / "session").exists()
    (path / "ballast").unlink()
    store = new_store(path / "session")
    descriptor = os.open(path / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError:
        os.close(descriptor)
    try:
        with store.lock(["00"]):
            update(store, "00", 1)
    except EdgetrainError as error:
        assert holds(reopened(path / "session"), "00", 0)
        (path / "ballast").unlink()
        with store.lock(["00"]):
            update(store, "00", 2)
        assert sound(reopened(path / "session"))
        exit_with(error)


def read_only(path: Path) -> None:
    """Everything that only reads works in a read-only folder; training says why it doesn't."""
    store = reopened(path)
    assert sound(store)
    assert holds(store, "00", 0)
    assert store.digest()
    try:
        with store.lock(["00"]):
            pass
    except EdgetrainError as error:
        exit_with(error)


def lock(path: Path) -> None:
    try:
        with reopened(path).lock(["01", "00"]):
            pass
    except EdgetrainError as error:
        exit_with(error)


if __name__ == "__main__":
    name, session, *rest = sys.argv[1:]
    globals()[name](Path(session), *map(int, rest))
