"""The weights of a Hugging Face folder: where each tensor lies, and its values in chunks.

A folder is checked whole when it is opened: what is there, in which files, of which shapes. Later only the values are
read, at known places.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.architectures import checkpoint_name, stage_shapes
from edgetrain.checkpoint.config import read_config
from edgetrain.checkpoint.files import file_inside, read_object, reading
from edgetrain.errors import BadInput, SessionCorrupt
from edgetrain.spec import LanguageModelSpec
from edgetrain.store import disk
from edgetrain.store.layout import ITEM_BYTES
from edgetrain.store.slot import read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""The types of weights, and what numpy holds them in: it knows no bfloat16, which is kept as its 16 bits."""

_GPT2_ROOT = "transformer."
_COMPARE_ELEMENTS = 1 << 18
# Tables that old versions of transformers saved beside the weights, and compute now.
_BUFFERS = {"llama": (".rotary_emb.inv_freq",), "gpt2": (".attn.bias", ".attn.masked_bias")}


@dataclass(frozen=True)
class Source:
    """A tensor in a file: ``nbytes`` bytes from ``position`` on, row by row, little endian."""

    path: Path
    position: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose tensors are all there: (stage, tensor), as in ``architectures``, -> its place."""

    folder: Path
    model: LanguageModelSpec
    tensors: Mapping[tuple[str, str], Source]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json and the headers of the weights: model.safetensors, or the shards that an index names.

    Raises:
        BadInput: there are no weights; a file is missing, damaged or outside the folder; a tensor is missing, unknown,
            there twice, or of a wrong shape or type. Names file and tensor.
        DiskError: a file cannot be read.
    """
    model = read_config(folder)
    found = _found(folder)
    tensors: dict[tuple[str, str], Source] = {}
    for stage, shapes in stage_shapes(model).items():
        for tensor, shape in shapes.items():
            name = _name_in(found, model, stage, tensor)
            source = found.pop(name, None)
            if source is None:
                raise BadInput(
                    f"{folder} lacks the tensor {name}, of shape {list(shape)}",
                    "Copy or download the weights again, with all of their files.",
                )
            _check(source, name, shape)
            tensors[stage, tensor] = source
    if model.tied:
        _check_tied(found.pop("lm_head.weight", None), tensors["embedding", "weight"])
    if unknown := sorted(name for name in found if not name.endswith(_BUFFERS[model.family])):
        rest = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise BadInput(
            f"{found[unknown[0]].path} has tensors that {model.architecture} with this config.json doesn't use: "
            f"{', '.join(unknown[:3])}{rest}",
            "What they would do in the model is unknown, so it isn't left out silently.",
        )
    return Checkpoint(folder, model, tensors)


def _found(folder: Path) -> dict[str, Source]:
    """All tensors of the folder's weights. Where both are there the single file counts, as for transformers."""
    if file_inside(folder, SINGLE).exists():
        return _read_file(folder, SINGLE)
    if not file_inside(folder, INDEX).exists():
        raise _no_weights(folder)
    shard_of = read_object(folder, INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise BadInput(f"{folder / INDEX} is damaged: weight_map is no object of tensors and their files")
    found: dict[str, Source] = {}
    for shard in dict.fromkeys(shard_of.values()):
        inside = _read_file(folder, shard)
        for name in inside:
            if (listed := shard_of.get(name)) != shard:
                says = f"in {listed!r}" if listed else "nowhere"
                raise BadInput(f"{folder / shard} has the tensor {name}, which {INDEX} says is {says}")
        found |= inside
    for name, shard in shard_of.items():
        if name not in found:
            raise BadInput(f"{folder / shard} lacks the tensor {name}, which {INDEX} says is in it")
    return found


def _read_file(folder: Path, name: str) -> dict[str, Source]:
    path = file_inside(folder, name)
    again = "Copy or download it again."
    if not path.exists():
        raise BadInput(f"{path} is missing", again)
    try:
        header = read_header(path)
    except SessionCorrupt as error:
        raise BadInput(error.message, again) from error
    return {
        tensor: Source(path, header.data_start + entry.begin, entry.end - entry.begin, entry.dtype, entry.shape)
        for tensor, entry in header.tensors.items()
    }


def _no_weights(folder: Path) -> BadInput:
    with reading(folder):
        there = sorted(path.name for path in folder.iterdir())
    if pickled := [name for name in there if name.endswith((".bin", ".pt", ".pth"))]:
        return BadInput(
            f"{folder} has its weights as {pickled[0]} only: such files are programs, and are never opened",
            "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, "
            "safe_serialization=True), or take a revision of the model with .safetensors files.",
        )
    others = [name for name in there if name.endswith(".safetensors")]
    return BadInput(
        f"{folder} has no weights: neither {SINGLE} nor {INDEX}" + (f", only {others[0]}" if others else ""),
        "Give the folder that a model was saved or downloaded to.",
    )


def _name_in(found: Mapping[str, Source], model: LanguageModelSpec, stage: str, tensor: str) -> str:
    """What the checkpoint calls the tensor, or should."""
    name = checkpoint_name(model, stage, tensor)
    if name in found:
        return name
    if model.family == "gpt2" and (bare := name.removeprefix(_GPT2_ROOT)) in found:
        return bare  # the files of the first GPT-2
    if stage == "embedding" and model.tied and "lm_head.weight" in found:
        return "lm_head.weight"  # saved under the other of its two names
    return name


def _check(source: Source, name: str, shape: tuple[int, ...]) -> None:
    if source.dtype not in STORED:
        raise BadInput(f"{source.path}: {name} is of the type {source.dtype}", f"Supported are {', '.join(STORED)}.")
    if source.shape != shape:
        raise BadInput(
            f"{source.path}: {name} has the shape {list(source.shape)}, by config.json it would be {list(shape)}",
            "config.json and the weights are not of one model: copy or download both again.",
        )


def _check_tied(output: Source | None, embedding: Source) -> None:
    """A tied model may have its one matrix under both names, but it must be the same one.

    If not, versions of transformers disagree on what the model computes: 4 ties them, 5 doesn't.
    """
    if output is None:
        return
    _check(output, "lm_head.weight", embedding.shape)
    pairs = zip(
        read_tensor_chunks(output, "F32", _COMPARE_ELEMENTS),
        read_tensor_chunks(embedding, "F32", _COMPARE_ELEMENTS),
        strict=True,
    )
    if not all(np.array_equal(one.view(np.uint32), other.view(np.uint32)) for one, other in pairs):
        raise BadInput(
            f"{output.path}: config.json says that the output matrix is the embedding, but lm_head.weight differs",
            'Say "tie_word_embeddings": false in config.json if the model has an output matrix of its own.',
        )


def read_tensor_chunks(source: Source, dtype: str, chunk_elements: int) -> Iterator[NDArray[Any]]:
    """The tensor's values in order, flat, as ``dtype`` (BF16 as its bits), ``chunk_elements`` at a time.

    Memory is a few chunks, whatever the tensor's size.

    Raises:
        BadInput: the file has become shorter, or a value is too large for ``dtype``.
        DiskError: the file cannot be read.
    """
    if chunk_elements < 1:
        raise ValueError(f"chunks of {chunk_elements} elements")
    stored = np.dtype(STORED[source.dtype]).newbyteorder("<")
    count = math.prod(source.shape)
    try:
        with disk.opened(source.path, os.O_RDONLY) as fd:
            for done in range(0, count, chunk_elements):
                raw = bytearray(min(chunk_elements, count - done) * ITEM_BYTES[source.dtype])
                disk.read_exactly(fd, memoryview(raw), source.position + done * ITEM_BYTES[source.dtype])
                yield _converted(np.frombuffer(raw, stored), source, dtype)
    except SessionCorrupt as error:  # the disk's words for a file that ends too early
        raise BadInput(error.message, "It has changed since it was opened: open the folder again.") from error


def _converted(values: NDArray[Any], source: Source, dtype: str) -> NDArray[Any]:
    try:
        return convert(values, source.dtype, dtype)
    except OverflowError as error:
        raise BadInput(f"{source.path}: {error}", "Choose bfloat16 or float32.") from error


def convert(values: NDArray[Any], stored: str, dtype: str) -> NDArray[Any]:
    """Values of one type as another, rounded to nearest, ties to even; no copy when it is the same type.

    Args:
        values: float32, float16, or uint16 with the bits of bfloat16, as ``stored`` says: "F32", "F16" or "BF16".

    Raises:
        OverflowError: a finite value would become infinite.
    """
    if stored == dtype:
        return values
    wide = (values.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else values.astype(np.float32)
    if dtype == "F32":
        return wide
    if dtype == "F16":
        with np.errstate(over="ignore"):
            narrow: NDArray[Any] = wide.astype(np.float16)
        infinite = np.isinf(narrow)
    else:
        bits = wide.view(np.uint32)
        # Adding just below half of the last kept place, and one more if that place is odd, carries where it rounds up.
        narrow = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        not_numbers = np.isnan(wide)
        narrow[not_numbers] = ((bits[not_numbers] >> 16) | 0x40).astype(np.uint16)  # else they may carry to infinity
        infinite = (narrow & 0x7FFF) == 0x7F80
    if (infinite & np.isfinite(wide)).any():
        largest = float(np.abs(wide[np.isfinite(wide)]).max())
        raise OverflowError(f"{largest:.6g} is too large for {dtype}")
    return narrow
