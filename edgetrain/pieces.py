"""How a block's trained tensors are cut into pieces for the optimizer, and what its buffers take. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgetrain.store.layout import StageLayout, TensorSpec

ITEM_BYTES = 4

# Parameters are updated in pieces of this many elements, whether their moments are resident or streamed piece by piece:
# a vectorised kernel may round a piece's tail otherwise than its body.
PIECE_ELEMENTS = 1 << 20


class Piece(NamedTuple):
    """Part of a trained tensor that one call of the optimizer updates; ``offset`` is in the section, in bytes, and
    ``stored_bytes`` reach to where the next piece begins: padding goes with the piece before it."""

    tensor: TensorSpec
    first: int
    num_elements: int
    offset: int
    stored_bytes: int


def pieces(layout: StageLayout) -> list[Piece]:
    """The whole section of a role in pieces, equal on every run."""
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


def buffer_bytes(layouts: Sequence[StageLayout], moments_resident: bool) -> dict[str, int]:
    """Bytes of each buffer that the stages of one block need, by owner."""
    trained = sum(layout.section_bytes("weight") for layout in layouts if layout.trained)
    frozen = sum(layout.section_bytes("frozen") for layout in layouts if not layout.trained)
    slice_bytes = max(
        (piece.stored_bytes for layout in layouts if layout.trained for piece in pieces(layout)), default=0
    )
    moments = 2 * (trained if moments_resident else slice_bytes)
    return {"weights": trained, "gradients": trained, "moments": moments, "frozen": frozen}
