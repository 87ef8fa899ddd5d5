"""How tensors are cut, into pieces for the optimizer and tiles for products, and what buffers take. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from edgetrain.store.layout import StageLayout, TensorSpec

ITEM_BYTES = 4

# Parameters are updated in pieces of this many elements, whether their moments are resident or streamed piece by piece:
# a vectorised kernel may round a piece's tail otherwise than its body.
PIECE_ELEMENTS = 1 << 18

# A product with a matrix of more elements goes tile by tile, wherever the matrix is: the cut decides how sums round.
_TILE_ELEMENTS = 1 << 22
_SMALLEST_TILED = 1 << 18
"""Elements; a smaller matrix is held with its layer's other tensors."""


class Piece(NamedTuple):
    """Part of a trained tensor that one call of the optimizer updates; ``offset`` is in the section, in bytes, and
    ``stored_bytes`` reach to where the next piece begins: padding goes with the piece before it."""

    tensor: TensorSpec
    first: int
    num_elements: int
    offset: int
    stored_bytes: int


def pieces(layout: StageLayout) -> list[Piece]:
    """The whole section of a role in memory, or of the moments, in pieces; equal on every run."""
    layout = layout.in_memory
    starts = [
        (tensor, first, layout.offset("weight", tensor.name) + first * ITEM_BYTES)
        for tensor in layout.tensors
        for first in range(0, tensor.nbytes // ITEM_BYTES, PIECE_ELEMENTS)
    ]
    ends = [offset for _, _, offset in starts[1:]] + [layout.section_bytes("weight")]
    return [
        Piece(tensor, first, min(PIECE_ELEMENTS, tensor.nbytes // ITEM_BYTES - first), offset, end - offset)
        for (tensor, first, offset), end in zip(starts, ends, strict=True)
    ]


def rows_of_tile(columns: int) -> int:
    """Rows of a matrix that a product takes at a time."""
    return max(1, _TILE_ELEMENTS // columns)


def tiled(layout: StageLayout) -> list[TensorSpec]:
    """The tensors of a transformer layer that need not be in memory as a whole: its larger matrices."""
    large = [t for t in layout.tensors if len(t.shape) == 2 and math.prod(t.shape) >= _SMALLEST_TILED]
    return large if len(large) < len(layout.tensors) else []


def without_tiled(layout: StageLayout) -> StageLayout:
    """What is held of a layer whose larger matrices come in tiles."""
    left_out = tiled(layout)
    return dataclasses.replace(layout, tensors=tuple(t for t in layout.tensors if t not in left_out))


def tile_bytes(layouts: Iterable[StageLayout]) -> tuple[int, int]:
    """Of the largest tile of a weight, and of a trained one."""
    sizes = [
        (layout.trained, min(tensor.shape[0], rows_of_tile(tensor.shape[1])) * tensor.shape[1] * ITEM_BYTES)
        for layout in layouts
        for tensor in tiled(layout)
    ]
    return max((size for _, size in sizes), default=0), max((size for trained, size in sizes if trained), default=0)


def buffer_bytes(
    units: Sequence[Sequence[StageLayout]], moments_resident: bool, in_tiles: Container[str] = ()
) -> dict[str, int]:
    """Bytes of each buffer that suffices for any one of the units, each given by its stages, by owner.

    ``in_tiles``: names of the stages whose larger matrices are not held here.
    """
    sizes = {"weights": 0, "gradients": 0, "moments": 0, "frozen": 0}
    for layouts in units:
        held = [(without_tiled(one) if one.name in in_tiles else one).in_memory for one in layouts]
        trained = sum(layout.section_bytes("weight") for layout in held if layout.trained)
        frozen = sum(layout.section_bytes("frozen") for layout in held if not layout.trained)
        slices = (piece.stored_bytes for layout in layouts if layout.trained for piece in pieces(layout))
        slice_bytes = max(slices, default=0)
        moments = 2 * (trained if moments_resident else slice_bytes)
        for owner, nbytes in {"weights": trained, "gradients": trained, "moments": moments, "frozen": frozen}.items():
            sizes[owner] = max(sizes[owner], nbytes)
    return sizes
