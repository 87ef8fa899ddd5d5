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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain import __version__
from edgetrain.errors import DiskError, SessionCorrupt, SessionLocked, UsageError
from edgetrain.recipe import RESUMABLE_KEYS, RESUMABLE_TABLES, difference, resolve, to_toml
from edgetrain.spec import Spec
from edgetrain.stages import Shapes, Stage, frozen, group_of_block, groups
from edgetrain.store import External, Place, Store, Transaction
from edgetrain.store.disk import disk_errors, make_folder, replace_file
from edgetrain.store.layout import StageLayout, TensorSpec

FORMAT_VERSION = 1
_MAX_JSON_BYTES = 16 << 20

Initial = Callable[[Stage, TensorSpec], Iterable[NDArray[Any]]]
"""The initial values of one tensor, in parts that follow each other, of the tensor's type (BF16 as its bits)."""

_ZEROS = memoryview(bytes(1 << 20))


@dataclass(frozen=True)
class BlockProgress:
    """How far a block is: all that resuming it needs. Kept in its group's manifest.

    ``skipped`` lists steps whose loss or gradient was not finite, or whose loss was hopeless; ``micro_batches`` lists
    (from step, size); it is empty until the first plan of a session that was imported.
    """

    step: int = 0
    skipped: tuple[int, ...] = ()
    micro_batches: tuple[tuple[int, int], ...] = ()
    loss: float | None = None

    @property
    def updates(self) -> int:
        return self.step - len(self.skipped)

    @property
    def micro_batch(self) -> int:
        """The one in use, 0 before the first plan."""
        return self.micro_batches[-1][1] if self.micro_batches else 0

    def with_micro_batch(self, micro_batch: int) -> BlockProgress:
        """From the next step on."""
        return replace(self, micro_batches=(*self.micro_batches, (self.step, micro_batch)))

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
        if any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError(f"{state}")
        if type(progress.loss) not in (float, type(None)):
            raise TypeError(f"loss {progress.loss!r}")
        return progress


class Session:
    """An existing session. ``create`` makes one, ``open`` finds one; both leave no half-made session behind."""

    def __init__(self, path: Path, spec: Spec, shapes: Shapes, store: Store, external: External) -> None:
        self.path, self.spec, self.shapes, self.store, self.external = path, spec, shapes, store, external

    @classmethod
    def exists(cls, path: Path) -> bool:
        return (path / "session.json").exists()

    @classmethod
    def create(
        cls,
        path: Path,
        spec: Spec,
        shapes: Shapes,
        initial: Initial,
        class_names: Sequence[str] = (),
        *,
        external: External = MappingProxyType({}),
        prepare: Callable[[], None] = lambda: None,
    ) -> Session:
        """Makes the files and commits the initial weights. ``class_names`` are kept for exports.

        Args:
            external: the frozen stages that stay where they are, by tensor.
            prepare: puts further files into the folder, before it is a session.

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
            store = Store.create(path, *_layouts(spec, shapes, external), external)
            prepare()
            _write(path / "spec.toml", to_toml(spec))
            with store.lock(groups(spec)):
                _write_initial(store, spec, shapes, initial, external)
            header: dict[str, Any] = {
                "format": "edgetrain.session", "version": FORMAT_VERSION, "edgetrain": __version__, "shapes": shapes,
            }  # fmt: skip
            if class_names:
                header["class_names"] = list(class_names)
            if external:
                header["external"] = _external_to_json(external)
            _write(path / "session.json", json.dumps(header, indent=1))
            marker.unlink()
        return cls(path, spec, shapes, store, external)

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
            spec = resolve(tomllib.loads((path / "spec.toml").read_text()), is_complete=True)
            external = _external_from_json(header.get("external", {}))
            layouts = _layouts(spec, header["shapes"], external)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise SessionCorrupt(f"{path}: spec.toml or session.json is damaged: {error}") from error
        store = Store.open(path, *layouts, external)
        if store.uncommitted:
            raise SessionCorrupt(
                f"{path}: the manifests of {', '.join(store.uncommitted)} are missing",
                "Copy groups/ and stages/ of a copy of this session back.",
            )
        return cls(path, spec, header["shapes"], store, external)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of a model of images; numbers where the data had no names."""
        numbers = [str(number) for number in range(self.spec.image_model.num_classes)]
        path = self.path / "session.json"
        names = read_json(path).get("class_names", numbers)
        if not isinstance(names, list) or len(names) != len(numbers) or not all(isinstance(n, str) for n in names):
            raise SessionCorrupt(f"{path} is damaged: its class_names are no {len(numbers)} names")
        return tuple(names)

    def with_its_micro_batch(self, spec: Spec) -> Spec:
        """Where ``spec`` leaves the micro-batch to the plan, which has chosen, with that of the session."""
        if spec.train.micro_batch:
            return spec
        return replace(spec, train=replace(spec.train, micro_batch=self.spec.train.micro_batch))

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
            progress = BlockProgress.from_state(state["blocks"][str(block)])
            if not progress.micro_batches and not self.spec.is_exact:
                raise ValueError("no micro-batch")
            return progress
        except (KeyError, TypeError, ValueError) as error:
            raise SessionCorrupt(f"{self.path}: the manifest of block {block} holds no progress: {error}") from error

    def layout(self, stage: Stage) -> StageLayout:
        """How a stage is stored."""
        return _frozen_layout(stage, self.shapes, self.external)

    @property
    def model_files(self) -> Path:
        """The folder with the tokenizer of a language model, and the configuration of an imported one."""
        return self.path / "model"

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


def _layouts(spec: Spec, shapes: Shapes, external: External) -> tuple[dict[str, list[StageLayout]], list[StageLayout]]:
    trained = {group: [stage.layout(shapes) for stage in members] for group, members in groups(spec).items()}
    return trained, [_frozen_layout(stage, shapes, external) for stage in frozen(spec)]


def _frozen_layout(stage: Stage, shapes: Shapes, external: External) -> StageLayout:
    """Tensors that stay where they are keep the type that they have there."""
    layout = stage.layout(shapes)
    places = external.get(stage.name)
    if places is None or stage.trained:
        return layout
    tensors = tuple(replace(tensor, dtype=places[tensor.name].dtype) for tensor in layout.tensors)
    return replace(layout, tensors=tensors)


def _external_to_json(external: External) -> dict[str, Any]:
    return {
        stage: {name: [str(place.path), place.position, place.dtype] for name, place in places.items()}
        for stage, places in external.items()
    }


def _external_from_json(value: Mapping[str, Any]) -> External:
    """ValueError, TypeError or AttributeError if it is none."""
    found = {
        stage: {name: Place(Path(path), position, dtype) for name, (path, position, dtype) in places.items()}
        for stage, places in value.items()
    }
    for place in (place for places in found.values() for place in places.values()):
        if type(place.position) is not int or place.position < 0:
            raise ValueError(f"position {place.position!r}")
    return found


def _write_initial(store: Store, spec: Spec, shapes: Shapes, initial: Initial, external: External) -> None:
    for stage in frozen(spec):
        layout = _frozen_layout(stage, shapes, external)
        store.write_frozen(stage.name, _section(stage, layout, "frozen", initial))
    fresh = BlockProgress()
    if spec.train.micro_batch:
        fresh = fresh.with_micro_batch(spec.train.micro_batch)
    for group, members in groups(spec).items():
        transaction = store.transaction(group)
        for stage in members:
            layout = stage.layout(shapes)
            _write_parts(transaction, stage, "weight", _section(stage, layout, "weight", initial))
            for role in ("m", "v"):
                _write_parts(transaction, stage, role, _zeros(layout.section_bytes(role)))
        blocks = [block for block in range(spec.num_blocks) if group_of_block(spec, block) == group]
        transaction.commit({"blocks": {str(block): asdict(fresh) for block in blocks}})


def _write_parts(transaction: Transaction, stage: Stage, role: str, parts: Iterable[memoryview]) -> None:
    done = 0
    for part in parts:
        transaction.write(stage.name, role, part, done)
        done += len(part)


def _section(stage: Stage, layout: StageLayout, role: str, initial: Initial) -> Iterator[memoryview]:
    """The bytes of a stage's section with its initial values, in order; padding is zeros."""
    done = 0
    for tensor in layout.tensors:
        yield from _zeros(layout.offset(role, tensor.name) - done)
        for part in initial(stage, tensor):
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        done = layout.offset(role, tensor.name) + tensor.nbytes
    yield from _zeros(layout.section_bytes(role) - done)


def _zeros(num_bytes: int) -> Iterator[memoryview]:
    for done in range(0, num_bytes, len(_ZEROS)):
        yield _ZEROS[: num_bytes - done]


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
