"""Bytes of stored tensors on their way into and out of memory, where all is fp32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgetrain.store.layout import ITEM_BYTES

Move = Callable[[str, str, memoryview, int], None]
"""``read`` or ``write`` of a store or transaction: (stage, role, bytes, offset)."""

_CONVERTED_ELEMENTS = 1 << 16


def in_order(move: Move, stage: str, role: str, offset: int = 0) -> Callable[[memoryview], None]:
    """Moves a stage's role, from ``offset`` on, by the pieces that a device hands out one after the other."""

    def piece(view: memoryview) -> None:
        nonlocal offset
        move(stage, role, view, offset)
        offset += len(view)

    return piece


def widened(stored: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Stored bytes of type F32, BF16 or F16 as float32, exactly."""
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _widening(read: Move, stage: str, role: str, offset: int, dtype: str) -> Callable[[memoryview], None]:
    """Reads a tensor that is stored as ``dtype`` from ``offset`` on, as float32."""
    item = ITEM_BYTES[dtype]

    def piece(view: memoryview) -> None:
        nonlocal offset
        into = np.frombuffer(view, np.float32)
        for first in range(0, len(into), _CONVERTED_ELEMENTS):
            part = into[first : first + _CONVERTED_ELEMENTS]
            stored = np.empty(len(part) * item, np.uint8)
            read(stage, role, stored.data, offset)
            part[:] = widened(stored, dtype)
            offset += len(stored)

    return piece


def _narrowing(write: Move, stage: str, role: str, offset: int) -> Callable[[memoryview], None]:
    """Writes float32 values that bf16 can hold as bf16, from ``offset`` on."""

    def piece(view: memoryview) -> None:
        nonlocal offset
        values = np.frombuffer(view, np.uint32)
        for first in range(0, len(values), _CONVERTED_ELEMENTS):
            stored = (values[first : first + _CONVERTED_ELEMENTS] >> 16).astype(np.uint16)
            write(stage, role, stored.view(np.uint8).data, offset)
            offset += stored.nbytes

    return piece


def reading(read: Move, stage: str, role: str, offset: int, dtype: str) -> Callable[[memoryview], None]:
    """Reads elements of a tensor that is stored as ``dtype`` from ``offset`` on, as float32."""
    return in_order(read, stage, role, offset) if dtype == "F32" else _widening(read, stage, role, offset, dtype)


def writing(write: Move, stage: str, role: str, offset: int, dtype: str) -> Callable[[memoryview], None]:
    """Writes float32 values to where a tensor is stored as ``dtype``, from ``offset`` on."""
    return in_order(write, stage, role, offset) if dtype == "F32" else _narrowing(write, stage, role, offset)
