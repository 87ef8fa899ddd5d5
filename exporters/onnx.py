"""A session as ONNX: emitted from its slots without torch, in the memory of one small buffer.

with stage(session, to, single_file=False) as staged:
    parity.check(session.path, staged.folder, reference, budget_bytes)
    export = staged.publish()
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from devices.limits import release_code, return_freed_memory
from devices.meter import usage
from edgetrain import __version__
from edgetrain.checkpoint import copy_tokenizer, read_object
from edgetrain.errors import BadInput, SessionLocked, UsageError
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec, ModelSpec, StackSpec, TextModelSpec
from edgetrain.stages import stages_of_block
from edgetrain.store import disk
from exporters import dit, language, text, vit
from exporters.graph import External, Graph, Storage, Stored
from exporters.manifest import (
    CODEBOOK,
    CONFIG,
    HEAD,
    MANIFEST,
    MODEL,
    MODEL_DATA,
    PREPROCESSING,
    STEM,
    WEIGHTS,
    FileRecord,
    LanguageManifest,
    Manifest,
    StackManifest,
    TextManifest,
    block_file,
    read,
)
from exporters.parity import PARITY, is_whole_classifier
from exporters.weights import Weights, write_model, write_safetensors, writing

if TYPE_CHECKING:
    from onnx import ModelProto

_CHECKED = "checked.onnx"


@dataclass(frozen=True)
class Export:
    """What was exported. ``emit_peak_bytes``: the most that the process had resident when emission ended."""

    files: tuple[Path, ...]
    emit_peak_bytes: int


class StagedExport:
    """A complete export in ``folder``, a hidden one beside where it will be."""

    def __init__(self, folder: Path, to: Path, emit_peak_bytes: int) -> None:
        self.folder = folder
        self.emit_peak_bytes = emit_peak_bytes
        self._to = to

    def publish(self) -> Export:
        """Puts it in place, instead of an earlier export if there is one.

        Raises:
            UsageError: meanwhile there is something else in that place.
        """
        check_replaceable(self._to)
        earlier = _beside(self._to, "earlier")
        with disk.disk_errors(self._to):
            for path in self.folder.iterdir():
                with disk.opened(path, os.O_RDONLY) as fd:
                    disk.sync_data(fd)
            disk.sync_folder(self.folder)
            shutil.rmtree(earlier, ignore_errors=True)
            if self._to.exists():
                self._to.rename(earlier)
            try:
                self.folder.rename(self._to)
            except OSError:
                if earlier.exists():
                    earlier.rename(self._to)
                raise
            disk.sync_folder(self._to.parent)
            shutil.rmtree(earlier, ignore_errors=True)
            return Export(tuple(sorted(self._to.iterdir())), self.emit_peak_bytes)


@contextmanager
def stage_artifacts(session: Session, to: Path, budget_bytes: int | None = None) -> Iterator[StagedExport]:
    """As ``stage``, of what onnxruntime's training API takes: its generator holds a block several times over.

    Raises:
        BudgetBroken: the budget does not suffice for that.
    """
    from exporters import ort_artifacts
    from exporters.serving import within

    to = to.absolute()
    check_replaceable(to)
    with _scratch_folder(to) as folder:
        with within(budget_bytes, "generating what trains"):
            ort_artifacts.emit(session, folder, session.store.digest())
        yield StagedExport(folder, to, usage().peak_bytes)


@contextmanager
def stage_stack(session: Session, to: Path, graphs: Path) -> Iterator[StagedExport]:
    """As ``stage``, of a stack of somebody's own, whose graphs ``exporters.stack`` left in the folder ``graphs``."""
    to = to.absolute()
    check_replaceable(to)
    model = session.spec.model
    assert isinstance(model, StackSpec)
    with _scratch_folder(to) as folder:
        files = {}
        with disk.disk_errors(folder):
            for path in sorted(graphs.iterdir()):
                path.rename(folder / path.name)
                _check(folder / path.name)
                files[path.name] = record(folder / path.name)
            graphs.rmdir()
        StackManifest(
            family=model.family, digest=session.store.digest(), stem=STEM in files, head=HEAD in files,
            order=tuple(model.order) or tuple(range(model.depth)), files=files,
        ).write(folder)  # fmt: skip
        yield StagedExport(folder, to, usage().peak_bytes)


@contextmanager
def stage(
    session: Session, to: Path, single_file: bool, storage: Storage = "fp32", merge: bool = False
) -> Iterator[StagedExport]:
    """Emits the session, to be published at ``to``; what was not published by the end is deleted.

    Args:
        single_file: the default chain in one model.onnx, instead of one graph for each block.
        storage: of the large matrices.
        merge: a LoRA adapter is added to the weights, instead of staying beside them.

    Raises:
        UsageError: ``to`` is something else than an earlier export, a single file would be too large, or there is
            nothing to merge.
        SessionLocked: another process is exporting to ``to``.
        DiskError: the disk is full, read-only, or failed.
    """
    to = to.absolute()
    check_mergeable(session, merge)
    check_replaceable(to)
    with _scratch_folder(to) as folder:
        _emit(session, folder, single_file, storage, merge)
        yield StagedExport(folder, to, usage().peak_bytes)


def warm_up() -> None:
    """Imports onnx and lets go of the code that this ran, and notes it: what is exported later lets go of it again.

    No other thread may load or unload libraries meanwhile.
    """
    import onnx.checker
    import onnx.helper  # noqa: F401

    release_code(noting=True)


def check_replaceable(to: Path) -> None:
    """Replacing ``to`` must lose nothing but an export: UsageError otherwise."""
    hint = "Name a new folder."
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise UsageError(f"{to} is not a folder", hint)
    present = {path.name for path in to.iterdir()} if to.exists() else set()
    if not present:
        return
    try:
        manifest = read(to)
    except BadInput as error:
        raise UsageError(f"{to} is not empty and is no export that could be replaced: {error.message}", hint) from error
    if others := sorted(present - {*manifest.files, MANIFEST, PARITY}):
        raise UsageError(f"{to} is an export, but holds other files as well: {', '.join(others)}", hint)


def check_mergeable(session: Session, merge: bool) -> None:
    """There must be an adapter if one is to be merged: UsageError otherwise."""
    if merge and session.spec.exact.train != "lora":
        raise UsageError(f"{session.path} has no adapter to merge", "Export it without --merge.")


def _beside(to: Path, purpose: str) -> Path:
    return to.with_name(f".{to.name}.{purpose}")


@contextmanager
def _scratch_folder(to: Path) -> Iterator[Path]:
    """An empty folder beside ``to``, deleted at the end if it is still there. One left by a kill is swept up."""
    folder = _beside(to, "partial")
    made = [one for one in to.parents if not one.exists()]
    with disk.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    own = os.fstat(descriptor).st_ino
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SessionLocked(f"another process is exporting to {to}") from error
        try:
            earlier = _beside(to, "earlier")
            with disk.disk_errors(folder):
                for left in folder.iterdir():
                    left.unlink()
                if earlier.exists() and not to.exists():  # a kill came between the two renames
                    earlier.rename(to)
            yield folder
        finally:
            # Published, it is elsewhere, and another process may have made one of its own since.
            if folder.exists() and folder.stat().st_ino == own:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # the first that holds something
            for parent in made:
                parent.rmdir()


def _emit(session: Session, folder: Path, single_file: bool, storage: Storage, merge: bool) -> None:
    weights = Weights(session, merge)
    digest = session.store.digest()
    if isinstance(session.spec.model, LanguageModelSpec):
        _emit_language(session, weights, folder, digest, single_file, storage)
        return
    if isinstance(session.spec.model, TextModelSpec):
        _emit_text(session, weights, folder, digest, single_file, storage)
        return
    emit = _single if single_file else _blocks
    files = emit(session, weights, folder, digest, storage)
    spec, schedule = session.spec, session.spec.diffusion_blocks.noise
    Manifest(
        family=spec.model.family,
        digest=digest,
        seed=spec.train.seed,
        single_file=single_file,
        image_shape=cast("tuple[int, int, int]", spec.image_model.image_shape),
        class_names=session.class_names,
        width=spec.image_model.width,
        schedule=replace(schedule, num_blocks=spec.num_blocks),
        files=files,
        storage=storage,
        whole=is_whole_classifier(spec),
    ).write(folder)


def _emit_language(  # noqa: PLR0917
    session: Session, weights: Weights, folder: Path, digest: str, single_file: bool, storage: Storage
) -> None:
    spec, model = session.spec, session.spec.language
    chunks = language.chunks_of_table(model)
    shapes = weights.shapes | {name: (rows, model.width) for name, (_, rows) in chunks.items()}
    graphs = (
        {MODEL: language.whole_model(spec, shapes, storage)}
        if single_file
        else dict(language.parts(spec, shapes, storage))
    )
    stored = [one for graph in graphs.values() for one in graph.weights()]
    used = dict.fromkeys(one for one in stored if one.name not in chunks)
    if not single_file:
        dtype = next(one.dtype for one in stored if one.name in chunks)
        used[Stored(language.table_of(model), weights.shapes[language.table_of(model)], dtype)] = None
    out, places = write_safetensors(folder / (MODEL_DATA if single_file else WEIGHTS), weights, used)
    files = {out.name: FileRecord(out.num_bytes, out.sha256)}
    for name, (first, rows) in chunks.items() if not single_file else ():
        table = places[language.table_of(model)]
        row_bytes = table.length // model.vocab_size
        places[name] = External(table.location, table.offset + first * row_bytes, rows * row_bytes)
    files |= _copied_tokenizer(session, folder)  # before onnx and its checker are in memory
    _write_graphs(session, graphs, folder, digest, places, files)
    LanguageManifest(
        family=model.family, digest=digest, single_file=single_file, num_chunks=len(chunks),
        vocab_size=model.vocab_size, max_length=model.max_length, depth=model.depth, kv_heads=model.kv_heads,
        head_dim=model.head_dim, files=files, storage=storage, length=spec.text.length,
    ).write(folder)  # fmt: skip


def _emit_text(  # noqa: PLR0917
    session: Session, weights: Weights, folder: Path, digest: str, single_file: bool, storage: Storage
) -> None:
    spec, model = session.spec, session.spec.text_model
    num_blocks = 1 if spec.is_exact else spec.num_blocks
    if single_file:
        graphs = {MODEL: text.single_graph(spec, weights.shapes, storage)}
    else:
        graphs = {block_file(i): text.block_graph(spec, i, weights.shapes, storage) for i in range(num_blocks)}
    used = dict.fromkeys(one for graph in graphs.values() for one in graph.weights())
    files: dict[str, FileRecord] = {}
    if not single_file and "codebook" in {stage.kind for stage in stages_of_block(spec, 0)}:
        used[Stored(CODEBOOK, weights.shapes[CODEBOOK])] = None  # the host knows by it what noisy tokens are
    out, places = write_safetensors(folder / (MODEL_DATA if single_file else WEIGHTS), weights, used)
    files[out.name] = FileRecord(out.num_bytes, out.sha256)
    files |= _copied_tokenizer(session, folder)  # before onnx and its checker are in memory
    _write_graphs(session, graphs, folder, digest, places, files)
    layers = [len(spec.layers_of(i)) if text.is_cached(spec) else 0 for i in range(1 if single_file else num_blocks)]
    if single_file and text.is_cached(spec):
        told = read_object(folder, CONFIG) if CONFIG in files else {}
        ends = {key: told[key] for key in ("eos_token_id", "bos_token_id") if key in told}
        config = json.dumps(text.llama_config(model, layers[0], spec.text.length) | ends, indent=1).encode()
        with writing(folder / CONFIG, len(config)) as out:
            out.write(config)
        files[CONFIG] = FileRecord(out.num_bytes, out.sha256)
    TextManifest(
        family=model.family, digest=digest, seed=spec.train.seed, single_file=single_file, whole=spec.is_exact,
        vocab_size=model.vocab_size, width=model.width, heads=model.heads, head_dim=model.head_dim,
        length=spec.text.length, layers=tuple(layers), streams=spec.diffusion_blocks.streams, loops=model.loops,
        schedule=replace(spec.diffusion_blocks.noise, num_blocks=num_blocks), files=files, storage=storage,
    ).write(folder)  # fmt: skip


def _write_graphs(  # noqa: PLR0917
    session: Session,
    graphs: dict[str, Graph],
    folder: Path,
    digest: str,
    places: Mapping[str, External],
    files: dict[str, FileRecord],
) -> None:
    """Writes and checks them, each gone from memory before it is checked."""
    for name in list(graphs):
        files[name] = _write(folder / name, graphs.pop(name).model(_properties(session, digest), __version__, places))
        return_freed_memory()
        release_code()
        _check(folder / name)


def _copied_tokenizer(session: Session, folder: Path) -> dict[str, FileRecord]:
    return {path.name: record(path) for path in copy_tokenizer(session.model_files, folder)}


def record(path: Path) -> FileRecord:
    """Of a file that is there."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _blocks(session: Session, weights: Weights, folder: Path, digest: str, storage: Storage) -> dict[str, FileRecord]:
    spec = session.spec
    if is_whole_classifier(spec):
        graphs = [vit.classifier(spec, weights.shapes, storage)]
    else:
        denoiser = dit.denoiser if spec.model.family == "dit" else vit.denoiser
        graphs = [denoiser(spec, block, weights.shapes, storage) for block in range(spec.num_blocks)]
    used = dict.fromkeys(one for graph in graphs for one in graph.weights())
    out, places = write_safetensors(folder / WEIGHTS, weights, used)
    files = {WEIGHTS: FileRecord(out.num_bytes, out.sha256)}
    for block, graph in enumerate(graphs):
        low, high = replace(spec.diffusion_blocks.noise, num_blocks=spec.num_blocks).band(block)
        properties = {"block": str(block), "sigma_low": repr(low), "sigma_high": repr(high)}
        path = folder / block_file(block)
        files[path.name] = _write(path, graph.model(_properties(session, digest) | properties, __version__, places))
        _check(path)
    return files


def _single(session: Session, weights: Weights, folder: Path, digest: str, storage: Storage) -> dict[str, FileRecord]:
    spec, schedule = session.spec, session.spec.diffusion_blocks.noise
    properties = _properties(session, digest)
    is_chain = spec.model.family != "dit" and not is_whole_classifier(spec)
    if is_chain:
        properties |= {
            "blocks": str(schedule.num_blocks),
            "sigma_low": repr(schedule.sigma_min),
            "sigma_high": repr(schedule.sigma_max),
            "noise_scale": repr(math.sqrt(1 + schedule.sigma_max**2)),
        }
    make = vit.chain if is_chain else dit.chain if spec.model.family == "dit" else vit.classifier
    # The checker would hold the whole file in memory: it gets a twin whose weights are elsewhere, in that very file.
    twin = {_CHECKED: make(spec, weights.shapes, storage)}
    model = twin[_CHECKED].model(properties, __version__, {})
    out, places = write_model(folder / MODEL, model, weights, twin[_CHECKED].weights())
    del model
    _write_graphs(session, twin, folder, digest, places, {})
    (folder / _CHECKED).unlink()
    return {MODEL: FileRecord(out.num_bytes, out.sha256)}


def _properties(session: Session, digest: str) -> dict[str, str]:
    return {
        "producer": f"edgetrain {__version__}",
        "digest": digest,
        "family": session.spec.model.family,
        **({"preprocessing": PREPROCESSING} if isinstance(session.spec.model, ModelSpec) else {}),
    }


def _write(path: Path, model: ModelProto) -> FileRecord:
    data = model.SerializeToString()
    with writing(path, len(data)) as out:
        out.write(data)
    return FileRecord(out.num_bytes, out.sha256)


def _check(path: Path) -> None:
    """Whether it is a valid model, with every shape inferred. Here none is in memory but the checker's."""
    from onnx import checker

    checker.check_model(str(path), full_check=True)
