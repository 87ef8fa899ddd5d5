"""Models and LoRA adapters as folders that transformers and peft load, streamed: no tensor is ever held whole."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.checkpoint.files import CONFIG, TOKENIZER_FILES, copy_file, present, read_object
from edgetrain.checkpoint.tensors import INDEX, SINGLE, STORED, convert
from edgetrain.errors import SessionLocked, UsageError
from edgetrain.store import disk
from edgetrain.store.layout import ITEM_BYTES, align

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (type, shape), in the order in which they are written; types as safetensors calls them."""
Chunks = Callable[[str], Iterable[Any]]
"""Name -> its bytes in order, in pieces of whole elements; each piece is used before the next is asked for."""
Check = Callable[[], None]
"""Called when all is written and nothing is there yet to be seen; what it raises leaves nothing."""

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# An adapter's folder with the other two would pass for a model's.
_OF_A_TOKENIZER = tuple(name for name in TOKENIZER_FILES if name not in (CONFIG, "generation_config.json"))
_ADAPTER_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def _nothing_to_check() -> None: ...


def write_folder(
    to: Path,
    model_files: Path,
    tensors: Tensors,
    chunks: Chunks,
    dtype: str,
    *,
    max_shard_bytes: int = 5 * 10**9,
    check: Check = _nothing_to_check,
) -> list[Path]:
    """A model's folder: its weights as ``dtype``, and config.json and the tokenizer's files from ``model_files``.

    The weights are model.safetensors, or shards of at most ``max_shard_bytes`` with their index. ``to`` appears
    whole, on the device, or not at all. Returns its files.

    Raises:
        UsageError: ``to`` is there and isn't empty, or a value is too large for ``dtype``.
        BadInput: a file of ``model_files`` is damaged, too large, or outside that folder.
        SessionLocked: another process is exporting to ``to``.
        DiskError: the disk is full (seen before anything is written), read-only, or failed.
    """
    config = read_object(model_files, CONFIG)
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, TORCH_NAMES[dtype])
    copied = {name: size for name, size in present(model_files).items() if name != CONFIG}
    texts = {CONFIG: _json(config)}
    shards = _shards(tensors, dtype, max_shard_bytes)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(math.prod(shape) * ITEM_BYTES[dtype] for _, shape in tensors.values())
        texts[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    files = {file: _WeightFile(names, tensors, dtype) for file, names in shards.items()}
    needed = sum(copied.values()) + sum(map(len, texts.values())) + sum(file.num_bytes for file in files.values())
    with _new_folder(to, needed, check) as folder:
        for name in copied:
            copy_file(model_files / name, folder / name)
        for name, weights in files.items():
            weights.write(folder / name, chunks)
        for name, text in texts.items():
            disk.replace_file(folder / name, text)
    return sorted(to.iterdir())


def adapter_name(checkpoint_name: str, factor: str) -> str:
    """What peft calls the factor "A" or "B" of LoRA on a weight that the checkpoint calls ``checkpoint_name``."""
    return f"base_model.model.{checkpoint_name.removesuffix('.weight')}.lora_{factor}.weight"


def write_adapter(
    to: Path,
    tensors: Tensors,
    chunks: Chunks,
    *,
    base_model_name: str,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    fan_in_fan_out: bool,
    model_files: Path | None = None,
    dtype: str | None = None,
    check: Check = _nothing_to_check,
) -> list[Path]:
    """peft's folder of a LoRA adapter, whose scale is ``alpha / rank``. Returns its files.

    Args:
        tensors: by ``adapter_name``; for each weight A of shape (rank, in) and B of shape (out, rank), of one type.
        fan_in_fan_out: the base model stores its linear maps as (in, out), as GPT-2 does.
        model_files: a folder with the tokenizer's files, which come along.
        dtype: what the factors are written as; None: as they are.

    Raises:
        UsageError, BadInput, SessionLocked, DiskError: as ``write_folder``.
        ValueError: a factor is missing, misnamed or of another rank, or types differ.
    """
    stored = _check_adapter(tensors, rank)
    dtype = dtype or stored
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(target_modules),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    weights, text = _WeightFile(list(tensors), tensors, dtype), _json(config)
    copied: dict[Path, int] = {}
    if model_files is not None:
        copied = {model_files / name: size for name, size in present(model_files, _OF_A_TOKENIZER).items()}
    with _new_folder(to, weights.num_bytes + len(text) + sum(copied.values()), check) as folder:
        for path in copied:
            copy_file(path, folder / path.name)
        weights.write(folder / ADAPTER, chunks)
        disk.replace_file(folder / ADAPTER_CONFIG, text)
    return sorted(to.iterdir())


def _check_adapter(tensors: Tensors, rank: int) -> str:
    factors: dict[str, set[str]] = {}
    for name, (_, shape) in tensors.items():
        match = _ADAPTER_NAME.fullmatch(name)
        if match is None or len(shape) != 2 or shape["AB".index(match[2])] != rank:
            raise ValueError(f"{name} of shape {shape} is no factor of LoRA of rank {rank}")
        factors.setdefault(match[1], set()).add(match[2])
    if alone := [name for name, pair in factors.items() if len(pair) != 2]:
        raise ValueError(f"{alone[0]} has one factor of LoRA only")
    dtypes = {dtype for dtype, _ in tensors.values()}
    if len(dtypes) != 1:
        raise ValueError(f"an adapter of the types {sorted(dtypes)}")
    return dtypes.pop()


def merged(
    base: Iterable[NDArray[np.float32]],
    shape: tuple[int, ...],
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    scale: float,
    *,
    dtype: str = "F32",
    fan_in_fan_out: bool = False,
) -> Iterator[NDArray[Any]]:
    """W + scale * B A, flat and in order, in as many pieces as ``base`` has; computed in float32, then rounded.

    Memory beside a piece: its whole rows of B A.

    Args:
        base: W's values in order, flat, in pieces of any size.
        shape: W's, (out, in); with ``fan_in_fan_out`` (in, out), and what is added is the transpose of B A.
        a: (rank, in).
        b: (out, rank).

    Raises:
        ValueError: the shapes don't fit each other, or ``base`` has too few or too many values.
        OverflowError: a value is too large for ``dtype``.
    """
    left, right = (a.T, b.T) if fan_in_fan_out else (b, a)  # (rows, rank), (rank, columns)
    if shape != (left.shape[0], right.shape[1]) or a.shape[0] != b.shape[1]:
        raise ValueError(f"A of shape {a.shape} and B of shape {b.shape} do not fit a weight of shape {shape}")
    columns, count, done = shape[1], math.prod(shape), 0
    for piece in base:
        end = done + len(piece)
        if end > count:
            raise ValueError(f"{end} values or more for a weight of shape {shape}")
        first, last = done // columns, -(-end // columns)
        added = np.float32(scale) * (left[first:last] @ right)  # (last - first, columns)
        yield convert(piece + added.reshape(-1)[done - first * columns :][: len(piece)], "F32", dtype)
        done = end
    if done != count:
        raise ValueError(f"{done} values for a weight of shape {shape}")


def _shards(tensors: Tensors, dtype: str, max_shard_bytes: int) -> dict[str, list[str]]:
    """{file: its tensors}, filled in order; a tensor larger than a shard has one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (_, shape) in tensors.items():
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if groups[-1] and filled + num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}


class _WeightFile:
    """A safetensors file of tensors of one type, as transformers writes them; its size is known before."""

    def __init__(self, names: Sequence[str], tensors: Tensors, dtype: str) -> None:
        self._stored = {name: tensors[name] for name in names}
        self._dtype = dtype
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (_, shape) in self._stored.items():
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            content[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        text = json.dumps(content, separators=(",", ":")).encode()
        start = align(8 + len(text), 8)  # readers that map the file need its values aligned
        self._header = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
        self.num_bytes = start + end

    def write(self, path: Path, chunks: Chunks) -> None:
        with disk.opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self.num_bytes) as fd:
            disk.write_fully(fd, memoryview(self._header), 0)
            done = len(self._header)
            for name, (stored, shape) in self._stored.items():
                begin, end = done, done + math.prod(shape) * ITEM_BYTES[self._dtype]
                for chunk in chunks(name):
                    data = self._as_written(name, stored, chunk)
                    disk.write_fully(fd, data, done)
                    disk.start_write_out(fd, done, len(data))
                    done += len(data)
                if done != end:
                    raise ValueError(f"{name} of shape {shape}: {done - begin} bytes instead of {end - begin}")
            os.fsync(fd)

    def _as_written(self, name: str, stored: str, chunk: Any) -> memoryview:
        data = memoryview(chunk).cast("B")
        if stored == self._dtype:
            return data
        try:
            values = convert(np.frombuffer(data, STORED[stored]), stored, self._dtype)
        except OverflowError as error:
            raise UsageError(f"{name}: {error}", "Export as bfloat16 or float32.") from error
        return values.data.cast("B")


@contextmanager
def _new_folder(to: Path, needed_bytes: int, check: Check) -> Iterator[Path]:
    """A hidden folder beside ``to``, which becomes ``to`` at the end, or vanishes on an error.

    The lock keeps two exports out of one folder; one that a kill left is swept up by the next.
    """
    to = to.absolute()
    _check_free(to)
    folder = to.with_name(f".{to.name}.partial")
    if needed_bytes > disk.free_bytes(to):
        raise disk.disk_full(to, needed_bytes)
    disk.make_folder(to.parent)
    with disk.disk_errors(folder, needed_bytes):
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SessionLocked(f"another process is exporting to {to}") from error
        try:
            with disk.disk_errors(folder, needed_bytes):
                for left in folder.iterdir():
                    left.unlink()
            yield folder
            check()
            disk.sync_folder(folder)
            _check_free(to)
            with disk.disk_errors(to):
                folder.rename(to)
            disk.sync_folder(to.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _check_free(to: Path) -> None:
    if to.is_symlink() or (to.exists() and not (to.is_dir() and not any(to.iterdir()))):
        raise UsageError(f"{to} is there already, and is no empty folder", "Name a new folder.")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
