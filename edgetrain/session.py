"""A session: one training, in one directory, resumable. This module knows its files; the engine trains it.

session.json   format version, and the shapes of the model's parameters; written last at creation
spec.toml      the resolved recipe
plan.json      the latest plan
metrics.jsonl  one line every few steps; a record for people, never read by edgetrain
groups/, stages/   the store's (see ``edgetrain.store``)
scratch/       activations and inflated data; always deletable
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain import __version__
from edgetrain.errors import DiskError, SessionCorrupt, SessionLocked, UsageError
from edgetrain.spec import RESUMABLE_KEYS, RESUMABLE_TABLES, Spec, difference, resolve, to_toml
from edgetrain.stages import Shapes, Stage, frozen, group_of_block, groups
from edgetrain.store import Store
from edgetrain.store.disk import disk_errors, make_folder, replace_file
from edgetrain.store.layout import StageLayout, TensorSpec

FORMAT_VERSION = 1
_MAX_JSON_BYTES = 16 << 20

Initial = Callable[[Stage, TensorSpec], NDArray[np.float32]]
"""The initial values of one tensor."""


@dataclass(frozen=True)
class BlockProgress:
    """How far a block is: all that resuming it needs. Kept in its group's manifest.

    ``skipped`` lists steps whose loss or gradient was not finite, or whose loss was hopeless; ``micro_batches`` lists
    (from step, size).
    """

    step: int = 0
    skipped: tuple[int, ...] = ()
    micro_batches: tuple[tuple[int, int], ...] = ()
    loss: float | None = None

    @property
    def updates(self) -> int:
        return self.step - len(self.skipped)

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps were skipped, back to the last that was not."""
        last_steps = range(self.step - 1, -1, -1)
        pairs = zip(reversed(self.skipped), last_steps, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BlockProgress:
        """What a manifest holds; KeyError, TypeError or ValueError if it is no progress."""
        progress = cls(
            step=state["step"],
            skipped=tuple(state["skipped"]),
            micro_batches=tuple((step, size) for step, size in state["micro_batches"]),
            loss=state["loss"],
        )
        numbers = [progress.step, *progress.skipped, *chain(*progress.micro_batches)]
        if any(type(number) is not int or number < 0 for number in numbers) or not progress.micro_batches:
            raise TypeError(f"{state}")
        if type(progress.loss) not in (float, type(None)):
            raise TypeError(f"loss {progress.loss!r}")
        return progress


class Session:
    """An existing session. ``create`` makes one, ``open`` finds one; both leave no half-made session behind."""

    def __init__(self, path: Path, spec: Spec, shapes: Shapes, store: Store) -> None:
        self.path, self.spec, self.shapes, self.store = path, spec, shapes, store

    @classmethod
    def exists(cls, path: Path) -> bool:
        return (path / "session.json").exists()

    @classmethod
    def create(
        cls, path: Path, spec: Spec, shapes: Shapes, initial: Initial, class_names: Sequence[str] = ()
    ) -> Session:
        """Makes the files and commits the initial weights. ``class_names`` are kept for exports.

        Raises:
            UsageError: the folder holds something else.
            SessionLocked: another process is creating it.
            DiskError: too little space (needed and free are named), or a read-only or failing disk.
        """
        marker = path / "session.creating"
        if path.exists() and not marker.exists() and any(entry.name != "scratch" for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty and is no session", "Name a new folder for the session.")
        make_folder(path)
        with _held(marker):
            if cls.exists(path):  # another process finished it while this one came
                return cls.open(path)
            for left in ("stages", "groups"):
                shutil.rmtree(path / left, ignore_errors=True)
            store = Store.create(path, *_layouts(spec, shapes))
            _write(path / "spec.toml", to_toml(spec))
            with store.lock(groups(spec)):
                _write_initial(store, spec, shapes, initial)
            header = {"format": "edgetrain.session", "version": FORMAT_VERSION, "edgetrain": __version__}
            names = {"class_names": list(class_names)} if class_names else {}
            _write(path / "session.json", json.dumps({**header, **names, "shapes": shapes}, indent=1))
            marker.unlink()
        return cls(path, spec, shapes, store)

    @classmethod
    def open(cls, path: Path) -> Session:
        """Reads a session; works on a read-only folder.

        Raises:
            UsageError: there is no session.
            SessionCorrupt: damaged, or of another version of the format.
        """
        if not cls.exists(path):
            hint = "Create it: edgetrain train SESSION --recipe NAME --memory-budget SIZE."
            raise UsageError(f"{path} is no session", hint)
        header = read_json(path / "session.json")
        version = header.get("version")
        if header.get("format") != "edgetrain.session" or not isinstance(version, int):
            raise SessionCorrupt(f"{path / 'session.json'} does not describe a session")
        if version > FORMAT_VERSION:
            raise SessionCorrupt(
                f"{path} has format version {version}, newer than edgetrain {__version__} knows: {FORMAT_VERSION}",
                "Install a newer edgetrain.",
            )
        try:
            spec = resolve(tomllib.loads((path / "spec.toml").read_text()))
            layouts = _layouts(spec, header["shapes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise SessionCorrupt(f"{path}: spec.toml or session.json is damaged: {error}") from error
        store = Store.open(path, *layouts)
        if store.uncommitted:
            raise SessionCorrupt(
                f"{path}: the manifests of {', '.join(store.uncommitted)} are missing",
                "Copy groups/ and stages/ of a copy of this session back.",
            )
        return cls(path, spec, header["shapes"], store)

    def check_change(self, spec: Spec) -> None:
        """Whether the spec may be replaced: the difference must be one that a session survives.

        Raises:
            UsageError: a key differs that decides what was trained already, or fewer steps than are done.
        """
        changed = difference(self.spec, spec)
        for key, (old, new) in changed.items():
            if key not in RESUMABLE_KEYS and key.partition(".")[0] not in RESUMABLE_TABLES:
                raise UsageError(
                    f"{key} is {old!r} in {self.path} and cannot become {new!r}: what was trained depends on it",
                    f"Start a new session, or change only {', '.join((*RESUMABLE_TABLES, *RESUMABLE_KEYS))}.",
                )
        done = max(self.progress(block).step for block in range(spec.num_blocks))
        if spec.train.steps < done:
            raise UsageError(f"{done} steps are trained already, more than the {spec.train.steps} asked for")

    def change(self, spec: Spec) -> None:
        """Replaces the spec, durably, after ``check_change``. Only under the locks of what is going to be trained."""
        self.check_change(spec)
        if spec != self.spec:
            _write(self.path / "spec.toml", to_toml(spec))
            self.spec = spec

    @property
    def scratch(self) -> Path:
        """The folder for what can be deleted at any time; made if missing."""
        folder = self.path / "scratch"
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def progress(self, block: int) -> BlockProgress:
        """What is committed of ``block``."""
        state = self.store.manifest(group_of_block(self.spec, block)).state
        try:
            return BlockProgress.from_state(state["blocks"][str(block)])
        except (KeyError, TypeError, ValueError) as error:
            raise SessionCorrupt(f"{self.path}: the manifest of block {block} holds no progress: {error}") from error

    def group_state(self, block: int, progress: BlockProgress) -> dict[str, Any]:
        """The state of the block's group with ``progress`` in place of what is committed of it."""
        group = group_of_block(self.spec, block)
        others = self.store.manifest(group).state["blocks"]
        return {"blocks": {**others, str(block): asdict(progress)}}

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        _write(self.path / "plan.json", json.dumps(plan, indent=1))

    def last_plan(self) -> dict[str, Any] | None:
        path = self.path / "plan.json"
        return read_json(path) if path.exists() else None

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends to metrics.jsonl."""
        with disk_errors(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the session; SessionCorrupt if it is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise SessionCorrupt(f"{path} has {path.stat().st_size} bytes, more than any that edgetrain writes")
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise SessionCorrupt(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise SessionCorrupt(f"{path} is damaged: it holds no object")
    return value


def _layouts(spec: Spec, shapes: Shapes) -> tuple[dict[str, list[StageLayout]], list[StageLayout]]:
    trained = {group: [stage.layout(shapes) for stage in members] for group, members in groups(spec).items()}
    return trained, [stage.layout(shapes) for stage in frozen(spec)]


def _write_initial(store: Store, spec: Spec, shapes: Shapes, initial: Initial) -> None:
    for stage in frozen(spec):
        store.write_frozen(stage.name, _section(stage, shapes, "frozen", initial).data)
    micro_batches = ((0, spec.train.micro_batch),)
    for group, members in groups(spec).items():
        transaction = store.transaction(group)
        for stage in members:
            weights = _section(stage, shapes, "weight", initial)
            transaction.write(stage.name, "weight", weights.data)
            weights[:] = 0
            for role in ("m", "v"):
                transaction.write(stage.name, role, weights.data)
        blocks = [block for block in range(spec.num_blocks) if group_of_block(spec, block) == group]
        fresh = asdict(BlockProgress(micro_batches=micro_batches))
        transaction.commit({"blocks": {str(block): fresh for block in blocks}})


def _section(stage: Stage, shapes: Shapes, role: str, initial: Initial) -> NDArray[np.uint8]:
    """The bytes of a stage's section with its initial values."""
    layout = stage.layout(shapes)
    section = np.zeros(layout.section_bytes(role), np.uint8)
    for tensor in layout.tensors:
        start = layout.offset(role, tensor.name)
        section[start : start + tensor.nbytes].view(np.float32)[:] = initial(stage, tensor).reshape(-1)
    return section


def _write(path: Path, text: str) -> None:
    replace_file(path, text.encode())


@contextmanager
def _held(marker: Path) -> Iterator[None]:
    """The marker of a creation under way, held by this process."""
    with disk_errors(marker):
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SessionLocked(f"another process is creating {marker.parent}") from error
    else:
        yield
    finally:
        os.close(descriptor)
