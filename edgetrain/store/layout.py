"""What a stage stores and where: a pure function of its tensors.

The same offsets hold in the file and in the flat memory buffer, so that a whole section moves in one call and a
module's parameters can be views into the buffer it was read into.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

TENSOR_ALIGNMENT = 64
"""Tensors start at multiples of a cache line, which also suits every vector load."""
SECTION_ALIGNMENT = 4096
"""Sections start at multiples of a page, in memory and on disk."""

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element, by the safetensors name of its type."""

_STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Role(NamedTuple):
    """One of the things that a stage keeps of each tensor.

    ``dtype`` is that of every tensor in this role, or None for each tensor's own. ``in_digest`` tells what the
    training is *for* (weights) from what it merely needs (moments).
    """

    name: str
    dtype: str | None
    in_digest: bool


TRAINED_ROLES = (Role("weight", None, True), Role("m", "F32", False), Role("v", "F32", False))
FROZEN_ROLES = (Role("frozen", None, True),)


def align(num_bytes: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, shape and type (a safetensors name, such as ``"BF16"``).

    Raises:
        ValueError: the name is empty, the type unknown, or a dimension is not positive.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"

    def __post_init__(self) -> None:
        if not self.name or self.dtype not in ITEM_BYTES or any(size <= 0 for size in self.shape):
            raise ValueError(f"no tensor can be stored as {self}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StageLayout:
    """The tensors of one stage and the place of each.

    A trained stage has the roles ``weight``, ``m`` and ``v``, in two slots ``a`` and ``b``; a stage that doesn't
    train has the role ``frozen``, in one file. A role's *section* holds its tensors in name order, each padded to
    a multiple of 64 bytes, the whole to a multiple of 4096.

    Raises:
        ValueError: a name cannot be a file's, or the tensors are none, or not in name order, or not distinct.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    trained: bool

    def __post_init__(self) -> None:
        if not _STAGE_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} cannot be a stage's name: letters, digits, '_', '-' and '.' can")
        names = [tensor.name for tensor in self.tensors]
        if not names or names != sorted(set(names)):
            raise ValueError(f"stage {self.name}: the tensors must be distinct and in name order: {names}")

    @property
    def roles(self) -> tuple[Role, ...]:
        return TRAINED_ROLES if self.trained else FROZEN_ROLES

    @property
    def slots(self) -> tuple[str, ...]:
        return ("a", "b") if self.trained else ("frozen",)

    @property
    def num_elements(self) -> int:
        """Of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def section_bytes(self, role: str) -> int:
        """Bytes of a role's section, padding included."""
        return self._sections[role][1]

    def offset(self, role: str, tensor_name: str) -> int:
        """Where a tensor begins inside its section, in bytes: in the file and in memory alike."""
        return self._sections[role][0][tensor_name]

    def tensors_of(self, role: str) -> Sequence[TensorSpec]:
        """The tensors as this role stores them: the same names and shapes, in the role's own type."""
        dtype = {known.name: known.dtype for known in self.roles}[role]
        return [TensorSpec(tensor.name, tensor.shape, dtype or tensor.dtype) for tensor in self.tensors]

    @cached_property
    def in_memory(self) -> StageLayout:
        """The layout of what is computed with: all F32."""
        return dataclasses.replace(
            self, tensors=tuple(dataclasses.replace(tensor, dtype="F32") for tensor in self.tensors)
        )

    @cached_property
    def _sections(self) -> dict[str, tuple[dict[str, int], int]]:
        """For each role: the tensors' offsets, and the section's bytes."""
        sections = {}
        for role in self.roles:
            offsets, end = {}, 0
            for tensor in self.tensors_of(role.name):
                offsets[tensor.name] = end
                end = align(end + tensor.nbytes, TENSOR_ALIGNMENT)
            sections[role.name] = offsets, align(end, SECTION_ALIGNMENT)
        return sections
