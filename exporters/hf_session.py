"""A language model's session as a folder for transformers, or its LoRA adapter as one for peft.

Every tensor goes from its slot, or from the file where it was left when it was imported, through one small buffer.
No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.adapters import lora_targets
from edgetrain.architectures import checkpoint_name, stage_shapes, stores_transposed
from edgetrain.checkpoint import convert, read_object
from edgetrain.checkpoint.files import CONFIG
from edgetrain.checkpoint.tensors import STORED
from edgetrain.errors import BadInput, SessionCorrupt, SessionLocked, UsageError
from edgetrain.session import Session
from edgetrain.stages import Stage, exact_stages
from exporters import hf

_PIECE_BYTES = 1 << 20
_DTYPES = {name: dtype for dtype, name in hf.TORCH_NAMES.items()}


@dataclass(frozen=True)
class Export:
    """What was exported; ``dtype`` is that of the weights, as safetensors calls it."""

    files: tuple[Path, ...]
    dtype: str


def warm_up() -> None:
    """Lets numpy reserve its room for products. Before a limit on memory is drawn: it ends the process when it gets
    none."""
    square = np.ones((256, 256), np.float32)
    np.matmul(square, square)


def export(
    session: Session, to: Path, *, dtype: str | None = None, merge: bool = False, check: hf.Check = lambda: None
) -> Export:
    """The model, or of a session that trains an adapter that alone, unless it is to be merged into the model.

    Args:
        dtype: None: that of the weights as they were imported; for an adapter that in which it is stored.
        merge: W + alpha / rank B A for every W that is adapted.
        check: called when all is written and nothing is there yet to be seen.

    Raises:
        UsageError: there is nothing to merge, ``to`` is there and isn't empty, or a value is too large for ``dtype``.
        SessionCorrupt: a file of the session, or one that its frozen weights were left in, is missing or damaged.
        SessionLocked: another process exports to ``to``, or has trained meanwhile.
        DiskError: the disk is full (seen before anything is written), read-only, or failed.
    """
    lora = session.spec.exact.train == "lora"
    if merge and not lora:
        raise UsageError(
            f"{session.path} has no adapter to merge: it trains the model itself", "Export it without --merge."
        )
    before = session.store.digest()

    def check_all() -> None:
        # What was read could be of several commits, or of none.
        if Session.open(session.path).store.digest() != before:
            raise SessionLocked(f"{session.path} was trained on while it was exported", "Export it again.")
        check()

    try:
        write = _write_model if merge or not lora else _write_adapter
        return write(session, to, dtype, check_all)
    except BadInput as error:  # the words for a folder from elsewhere; this one is the session's
        raise SessionCorrupt(error.message, "Copy the session again, with all of its files.") from error


def _write_model(session: Session, to: Path, dtype: str | None, check: hf.Check) -> Export:
    tensors = _model_tensors(session)
    if session.spec.exact.train == "lora":
        tensors |= _merged(session, tensors)
    dtype = dtype or _imported_dtype(session)
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    files = hf.write_folder(to, session.model_files, described, lambda name: tensors[name].pieces(), dtype, check=check)
    return Export(tuple(files), dtype)


def _write_adapter(session: Session, to: Path, dtype: str | None, check: hf.Check) -> Export:
    model, exact = session.spec.language, session.spec.exact
    tensors = {
        hf.adapter_name(weight, factor): tensor
        for weight, factors in _adapters(session).items()
        for factor, tensor in zip("AB", factors, strict=True)
    }
    stored = next(iter(tensors.values())).dtype
    files = hf.write_adapter(
        to,
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        lambda name: tensors[name].pieces(),
        base_model_name=str(_base_folder(session)),
        rank=exact.rank,
        alpha=exact.alpha,
        dropout=exact.dropout,
        target_modules=lora_targets(session.spec),
        fan_in_fan_out=stores_transposed(model),
        model_files=session.model_files,
        dtype=dtype,
        check=check,
    )
    return Export(tuple(files), dtype or stored)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the exported model. ``pieces``: its bytes in order, each piece gone when the next is asked for."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]

    def floats(self) -> Iterator[NDArray[np.float32]]:
        """Its values in order, flat, in as many pieces."""
        for piece in self.pieces():
            yield convert(piece, self.dtype, "F32")

    def whole(self) -> NDArray[np.float32]:
        return np.concatenate([piece.copy() for piece in self.floats()]).reshape(self.shape)


def _stored(session: Session, stages: list[Stage], name: str) -> _Tensor:
    """The tensor ``name`` of a stage; of several, which are the rows of a table, all of it."""
    layouts = [session.layout(stage) for stage in stages]
    specs = [next(tensor for tensor in layout.tensors if tensor.name == name) for layout in layouts]
    role = "weight" if stages[0].trained else "frozen"
    dtype, (_, *columns) = specs[0].dtype, specs[0].shape

    def pieces() -> Iterator[NDArray[Any]]:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for layout, tensor in zip(layouts, specs, strict=True):
            start = layout.offset(role, name)
            for done in range(0, tensor.nbytes, _PIECE_BYTES):
                piece = buffer[: tensor.nbytes - done]
                session.store.read(layout.name, role, piece, start + done)
                yield np.frombuffer(piece, STORED[dtype])

    return _Tensor(dtype, (sum(tensor.shape[0] for tensor in specs), *columns), pieces)


def _model_tensors(session: Session) -> dict[str, _Tensor]:
    """The tensors of the model without adapters, by the names that a checkpoint has for them, in the order of data."""
    model = session.spec.language
    stages: dict[str, list[Stage]] = {}
    for stage in exact_stages(session.spec).stages:
        if stage.kind != "lora":
            stages.setdefault(stage.name.partition(".")[0], []).append(stage)
    return {
        checkpoint_name(model, stage, tensor): _stored(session, stages[stage], tensor)
        for stage, shapes in stage_shapes(model).items()
        for tensor in shapes
    }


def _adapters(session: Session) -> dict[str, tuple[_Tensor, _Tensor]]:
    """A and B of every weight that is adapted."""
    found = {}
    for stage in exact_stages(session.spec).stages:
        if stage.kind == "lora":
            layer = stage.name.removesuffix(".lora")
            for tensor in session.layout(stage).tensors:
                linear, is_a, _ = tensor.name.partition(".lora_A.weight")
                if is_a:
                    weight = checkpoint_name(session.spec.language, layer, f"{linear}.weight")
                    a, b = (_stored(session, [stage], f"{linear}.lora_{factor}.weight") for factor in "AB")
                    found[weight] = a, b
    return found


def _merged(session: Session, tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """W + alpha / rank B A of every weight that is adapted; its factors are in memory while it is written."""
    exact, transposed = session.spec.exact, stores_transposed(session.spec.language)

    def one(base: _Tensor, a: _Tensor, b: _Tensor) -> _Tensor:
        def pieces() -> Iterator[NDArray[Any]]:
            yield from hf.merged(
                base.floats(), base.shape, a.whole(), b.whole(), exact.alpha / exact.rank, fan_in_fan_out=transposed
            )

        return _Tensor("F32", base.shape, pieces)

    return {weight: one(tensors[weight], *factors) for weight, factors in _adapters(session).items()}


def _imported_dtype(session: Session) -> str:
    """What config.json says of the weights; F32 where it says nothing that can be written."""
    config = read_object(session.model_files, CONFIG)
    said = (config.get(key) for key in ("dtype", "torch_dtype"))
    return next((_DTYPES[name] for name in said if isinstance(name, str) and name in _DTYPES), "F32")


def _base_folder(session: Session) -> Path:
    """Where peft is to find the model: what was imported if its weights are still there, else the session's folder of
    its configuration."""
    for places in session.external.values():
        for place in places.values():  # a file of weights may lie deeper than config.json
            return next((up for up in place.path.parents if (up / CONFIG).is_file()), place.path.parent)
    return session.model_files.absolute()
