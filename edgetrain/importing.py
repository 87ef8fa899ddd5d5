"""Making a session of a pretrained model: its weights are streamed from the files that they came in. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgetrain.adapters import initial_adapter, lora_shapes
from edgetrain.architectures import head_shapes, layer_shapes, stem_shapes
from edgetrain.checkpoint import Checkpoint, Source, convert, copy_tokenizer, read_tensor_chunks
from edgetrain.errors import UsageError
from edgetrain.randomness import Purpose, Stream, uniform
from edgetrain.recipe import Changes, resolve
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import Shapes, Stage, exact_stages, rows_of_chunk
from edgetrain.store import Place
from edgetrain.store.layout import TensorSpec

_CHUNK_ELEMENTS = 1 << 18


def language_shapes(spec: Spec) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of a language model's parameters, by kind of stage."""
    model, exact = spec.language, spec.exact
    rows = rows_of_chunk(model.width)
    tables = ("embedding",) if model.tied else ("embedding", "output")
    last = model.vocab_size % rows
    found: dict[str, dict[str, tuple[int, ...]]] = {
        **{table: {"weight": (rows, model.width)} for table in tables},
        **({f"{table}.last": {"weight": (last, model.width)} for table in tables} if last else {}),
        "stem": stem_shapes(model),
        "layer": layer_shapes(model),
        "head": head_shapes(model),
    }
    if exact.train == "lora":
        found["lora"] = lora_shapes(spec)
    return found


def spec_of(checkpoint: Checkpoint, recipe: Mapping[str, Any], changes: Changes) -> Spec:
    """The spec of fine-tuning a checkpoint by a recipe.

    Raises:
        UsageError: as ``resolve``; or the recipe describes another model.
    """
    if "model" in recipe or any(key.startswith("model.") for key in changes):
        raise UsageError("the model is that of the folder: a recipe for it has no [model]")
    spec = resolve({**recipe, "model": dataclasses.asdict(checkpoint.model)}, changes)
    if not spec.is_exact:
        raise UsageError("pretrained models are trained by the exact objective", 'Set train.objective = "exact".')
    language_shapes(spec)  # targets of adapters that are none are an error here
    return spec


def import_checkpoint(checkpoint: Checkpoint, path: Path, spec: Spec, copy: bool) -> Session:
    """A new session with the checkpoint's weights. ``copy``: also of those that do not train, which otherwise stay.

    Raises:
        UsageError, SessionLocked, DiskError: as ``Session.create``; what is at ``path`` already is left as it is.
        BadInput: the files have changed since they were opened.
    """
    if Session.exists(path):
        raise UsageError(f"{path} is a session already", "Train it, or name a new folder for another one.")
    shapes: Shapes = language_shapes(spec)
    stages = exact_stages(spec)
    external: dict[str, dict[str, Place]] = {}
    if not copy:
        for stage in stages.stages:
            if not stage.trained:
                sources = {name: _source(checkpoint, stage, name) for name in shapes[stage.kind]}
                external[stage.name] = {
                    name: Place(source.path.absolute(), source.position, source.dtype)
                    for name, source in sources.items()
                }

    def initial(stage: Stage, tensor: TensorSpec) -> Iterator[NDArray[Any]]:
        if stage.kind != "lora":
            yield from read_tensor_chunks(_source(checkpoint, stage, tensor.name), tensor.dtype, _CHUNK_ELEMENTS)
            return
        number = sorted(shapes["lora"]).index(tensor.name)
        stream = Stream(spec.train.seed, Purpose.INIT, stage.index, number)
        values = initial_adapter(tensor.name, tensor.shape, uniform(stream, 0, 1, math.prod(tensor.shape)))
        yield convert(values.reshape(-1), "F32", tensor.dtype)

    def copy_files() -> None:
        folder = path / "model"
        folder.mkdir(exist_ok=True)
        copy_tokenizer(checkpoint.folder, folder)

    return Session.create(path, spec, shapes, initial, external=external, prepare=copy_files)


def _source(checkpoint: Checkpoint, stage: Stage, tensor: str) -> Source:
    """Where a stage's tensor lies in the checkpoint; of a chunk of a table, its rows."""
    name, _, number = stage.name.partition(".")
    source = checkpoint.tensors[name, tensor]
    if name not in ("embedding", "output"):
        return source
    num_rows, width = source.shape
    rows = rows_of_chunk(width)
    first = int(number) * rows
    count = min(rows, num_rows - first)
    row_bytes = source.nbytes // num_rows
    return replace(source, position=source.position + first * row_bytes, nbytes=count * row_bytes, shape=(count, width))
