"""The weights of a session on their way into an export: streamed from the slots through one small buffer.

Two places for them: a safetensors file that the graphs point into, or the model's own file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetrain.architectures import stores_transposed
from edgetrain.checkpoint import convert
from edgetrain.errors import UsageError
from edgetrain.session import Session
from edgetrain.spec import LanguageModelSpec
from edgetrain.stages import stages_of_block
from edgetrain.store import disk
from edgetrain.store.layout import SECTION_ALIGNMENT, align
from edgetrain.units import format_bytes
from exporters.graph import External, Stored, message_of
from exporters.hf import merged

if TYPE_CHECKING:
    from onnx import ModelProto

FORMAT = "edgetrain.weights"
MAX_MODEL_BYTES = 2**31 - 1
"""What a protobuf message can hold."""
_LORA = ".lora."
_CHUNK_BYTES = 1 << 20
_TILE_BYTES = 8 << 20
_LEVELS, _ZERO_POINT = 127, 128  # of int8


@dataclass(frozen=True)
class Part:
    """Where some of a tensor's rows are: from ``offset`` on in the section of a stage's role, stored as ``dtype``."""

    stage: str
    role: str
    offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True)
class Weight:
    """A tensor of the session, float32 in an export, by the name it has there: STAGE.TENSOR."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class Weights:
    """All weights of a session, as committed when it was opened; what several blocks share is there once.

    Args:
        merge: adapters are added to the weights that they adapt, and are none of their own.
    """

    def __init__(self, session: Session, merge: bool = False) -> None:
        self._store = session.store
        self._merge, self._exact, self._model = merge, session.spec.exact, session.spec.model
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._weights: dict[str, Weight] = {}
        stages = {s.name: s for block in range(session.spec.num_blocks) for s in stages_of_block(session.spec, block)}
        for stage in stages.values():
            layout = session.layout(stage)
            role = layout.roles[0].name
            # The chunks of a table are one tensor outside.
            whole, _, number = stage.name.partition(".")
            owner = whole if whole in ("embedding", "output") and number.isdecimal() else stage.name
            for tensor in layout.tensors:
                name, offset = f"{owner}.{tensor.name}", layout.offset(role, tensor.name)
                part = Part(stage.name, role, offset, tensor.nbytes, tensor.dtype)
                before = self._weights.get(name)
                if before is None:
                    self._weights[name] = Weight(name, tensor.shape, (part,))
                else:
                    rows = before.shape[0] + tensor.shape[0]
                    self._weights[name] = Weight(name, (rows, *tensor.shape[1:]), (*before.parts, part))

    @property
    def shapes(self) -> dict[str, Sequence[int]]:
        return {name: weight.shape for name, weight in self._weights.items() if not (self._merge and _LORA in name)}

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def chunks(self, stored: Stored) -> Iterator[memoryview]:
        """The bytes in order; each chunk is gone when the next one is asked for."""
        if stored.form == "int8":
            yield from self._quantised(stored)
        elif stored.form == "scale":
            yield self._scales(stored).view(np.uint8).data
        else:
            for values in self._elements(self[stored.name]):
                try:
                    yield convert(values, "F32", stored.dtype).view(np.uint8).data
                except OverflowError as error:
                    raise UsageError(
                        f"{stored.name} does not fit {stored.dtype}: {error}", "Export as fp32."
                    ) from error

    def _elements(self, weight: Weight) -> Iterator[NDArray[np.float32]]:
        """In order, those of an adapter added where they are to be."""
        stage, _, name = weight.name.partition(".")
        factors = [f"{stage}{_LORA}{name.removesuffix('.weight')}.lora_{factor}.weight" for factor in "AB"]
        if not self._merge or factors[0] not in self._weights:
            return self._stored(weight)
        a, b = (np.concatenate([one.copy() for one in self._stored(self[f])]).reshape(self[f].shape) for f in factors)
        transposed = isinstance(self._model, LanguageModelSpec) and stores_transposed(self._model)
        scale = self._exact.alpha / self._exact.rank
        return merged(self._stored(weight), weight.shape, a, b, scale, fan_in_fan_out=transposed)

    def _stored(self, weight: Weight) -> Iterator[NDArray[np.float32]]:
        """Its elements in order, as the session has them."""
        for part in weight.parts:
            for done in range(0, part.nbytes, len(self._buffer)):
                chunk = self._buffer[: part.nbytes - done]
                self._store.read(part.stage, part.role, chunk, part.offset + done)
                values = np.frombuffer(chunk, {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[part.dtype])
                yield values if part.dtype == "F32" else convert(values, part.dtype, "F32")

    def _rows(self, weight: Weight) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(number of the first, some rows) of a matrix, in order."""
        width = weight.shape[1]
        first, left = 0, np.empty(0, np.float32)
        for some in self._elements(weight):
            values = np.concatenate([left, some])
            count = len(values) // width
            left = values[count * width :].copy()
            if count:
                yield first, values[: count * width].reshape(count, width)
            first += count

    def _scales(self, stored: Stored) -> NDArray[np.float32]:
        """Of each output channel, its largest element over 127, (out,); 1 where all are 0."""
        source = self[stored.source]
        largest = np.zeros(source.shape[stored.channels], np.float32)
        for first, rows in self._rows(source):
            if stored.channels == 0:
                largest[first : first + len(rows)] = np.abs(rows).max(1)
            else:
                np.maximum(largest, np.abs(rows).max(0), out=largest)
        return np.where(largest > 0, largest / np.float32(_LEVELS), np.float32(1))

    def _quantised(self, stored: Stored) -> Iterator[memoryview]:
        """(in, out): of a matrix (out, in) some columns at a time, for which it is read again."""
        source, scales = self[stored.source], self._scales(stored)
        if stored.channels == 1:
            for _, rows in self._rows(source):
                yield _levels(rows / scales).reshape(-1).data
            return
        num_in, num_out = stored.shape
        at_once = max(1, _TILE_BYTES // num_out)
        for start in range(0, num_in, at_once):
            tile = np.empty((min(at_once, num_in - start), num_out), np.uint8)
            for first, rows in self._rows(source):
                those = slice(first, first + len(rows))
                tile[:, those] = _levels(rows[:, start : start + at_once] / scales[those, None]).T
            yield tile.reshape(-1).data


def _levels(quotients: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (np.rint(quotients) + _ZERO_POINT).astype(np.uint8)


class Output:
    """A file written from start to end, its size and SHA-256 known at the end."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self.name = fd, name
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        disk.write_fully(self._fd, memoryview(data), self.num_bytes)
        disk.start_write_out(self._fd, self.num_bytes, len(data))
        self._digest.update(data)
        self.num_bytes += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def writing(path: Path, expected_bytes: int = 0) -> Iterator[Output]:
    """A new file; errors of the disk are explained, with ``expected_bytes`` as what was needed."""
    with disk.opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, expected_bytes) as fd:
        yield Output(fd, path.name)


def write_safetensors(path: Path, weights: Weights, stored: Iterable[Stored]) -> tuple[Output, dict[str, External]]:
    """A safetensors file of the weights, each at a multiple of the page size so that a runtime can map it.

    The format allows no gaps: padding is tensors too, called ``pad.0``, ``pad.1``, ... as in the slots.

    Returns:
        The finished file, and the place of each weight in it.
    """
    members = {one.name: one for one in stored}
    header, offsets, end = _safetensors_header(list(members.values()))
    with writing(path, end) as out:
        out.write(header)
        for name, offset in offsets.items():
            out.write(bytes(offset - out.num_bytes))
            for chunk in weights.chunks(members[name]):
                out.write(chunk)
        out.write(bytes(end - out.num_bytes))
    return out, {name: External(path.name, offset, members[name].nbytes) for name, offset in offsets.items()}


def _safetensors_header(weights: Sequence[Stored]) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of the file, the position in it of each weight, and its size."""
    content: dict[str, object] = {"__metadata__": {"format": FORMAT, "version": "1"}}
    begins, end = {}, 0
    for number, weight in enumerate(weights):
        begins[weight.name], end = end, end + weight.nbytes
        entry = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": (end - weight.nbytes, end)}
        content[weight.name] = entry
        if padding := align(end, SECTION_ALIGNMENT) - end:
            entry = {"dtype": "U8", "shape": (padding,), "data_offsets": (end, end + padding)}
            content[f"pad.{number}"] = entry
            end += padding
    text = json.dumps(content, separators=(",", ":")).encode()
    start = align(8 + len(text), SECTION_ALIGNMENT)
    header = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
    return header, {name: start + begin for name, begin in begins.items()}, start + end


def write_model(
    path: Path, model: ModelProto, weights: Weights, stored: Iterable[Stored]
) -> tuple[Output, dict[str, External]]:
    """A model's file with the weights inside, added to those that ``model`` holds; of ``model`` no graph is left.

    Protobuf writes fields in any order: the graph comes last, its initializers last in it, each with its bytes last.
    So all lengths are known beforehand, and no weight is ever held in memory.

    Returns:
        The finished file, and the place of each weight in it.

    Raises:
        UsageError: it would be larger than a protobuf message can be.
    """
    from onnx import GraphProto, ModelProto

    tensors = [(one, _tensor_start(one)) for one in stored]
    fields = [
        _field(GraphProto.INITIALIZER_FIELD_NUMBER, len(start) + weight.nbytes) + start for weight, start in tensors
    ]
    graph = model.graph.SerializeToString()
    graph_bytes = len(graph) + sum(map(len, fields)) + sum(weight.nbytes for weight, _ in tensors)
    model.ClearField("graph")
    head = model.SerializeToString() + _field(ModelProto.GRAPH_FIELD_NUMBER, graph_bytes)
    if len(head) + graph_bytes > MAX_MODEL_BYTES:
        raise UsageError(
            f"a single file would have {format_bytes(len(head) + graph_bytes)}, "
            f"more than the {format_bytes(MAX_MODEL_BYTES)} that ONNX allows",
            "Export without --single-file: one graph for each block, and the weights in a file of their own.",
        )
    places = {}
    with writing(path, len(head) + graph_bytes) as out:
        out.write(head + graph)
        for (weight, _), field in zip(tensors, fields, strict=True):
            out.write(field)
            places[weight.name] = External(path.name, out.num_bytes, weight.nbytes)
            for chunk in weights.chunks(weight):
                out.write(chunk)
    return out, places


def _tensor_start(weight: Stored) -> bytes:
    """A serialised TensorProto up to the first byte of its data."""
    from onnx import TensorProto

    return message_of(weight).SerializeToString() + _field(TensorProto.RAW_DATA_FIELD_NUMBER, weight.nbytes)


def _field(number: int, num_bytes: int) -> bytes:
    """What protobuf writes before a field of ``num_bytes`` bytes (wire type 2)."""
    return _varint(number << 3 | 2) + _varint(num_bytes)


def _varint(value: int) -> bytes:
    """Base 128, lowest digit first, the top bit set on all but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
