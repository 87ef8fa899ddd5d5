"""How trained tensors are cut into pieces for the optimizer, and what buffers take. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgetrain.store.layout import StageLayout, TensorSpec

ITEM_BYTES = 4

# Parameters are updated in pieces of this many elements, whether their moments are resident or streamed piece by piece:
# a vectorised kernel may round a piece's tail otherwise than its body.
PIECE_ELEMENTS = 1 << 18


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


def buffer_bytes(units: Sequence[Sequence[StageLayout]], moments_resident: bool) -> dict[str, int]:
    """Bytes of each buffer that suffices for any one of the units, each given by its stages, by owner."""
    sizes = {"weights": 0, "gradients": 0, "moments": 0, "frozen": 0}
    for layouts in units:
        trained_layouts = [layout.in_memory for layout in layouts if layout.trained]
        trained = sum(layout.section_bytes("weight") for layout in trained_layouts)
        frozen = sum(layout.in_memory.section_bytes("frozen") for layout in layouts if not layout.trained)
        slice_bytes = max((piece.stored_bytes for layout in trained_layouts for piece in pieces(layout)), default=0)
        moments = 2 * (trained if moments_resident else slice_bytes)
        for owner, nbytes in {"weights": trained, "gradients": trained, "moments": moments, "frozen": frozen}.items():
            sizes[owner] = max(sizes[owner], nbytes)
    return sizes
