"""Which stages a spec has, who trains them, and what is committed together. No torch here.

A block is visited with its stem, its layers, its head and the codebook. Private stages belong to one block, shared
ones are trained by every visit, frozen ones by none. Blocks that share nothing are a commit group each, so that one
can be trained on a machine of its own; as soon as anything is shared, all trained stages form one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetrain.spec import Sharing, Spec
from edgetrain.store.layout import StageLayout, TensorSpec

StageKind = Literal["codebook", "stem", "layer", "head"]
Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""{stage kind: {parameter name: shape}}: what the family's modules hold."""

SHARED_GROUP = "all"


@dataclass(frozen=True)
class Stage:
    """``index`` numbers the stages of a spec: it keys the stage's initial values."""

    name: str
    kind: StageKind
    sharing: Sharing
    index: int

    @property
    def trained(self) -> bool:
        return self.sharing != "frozen"

    def layout(self, shapes: Shapes) -> StageLayout:
        tensors = sorted((name, tuple(shape)) for name, shape in shapes[self.kind].items())
        return StageLayout(self.name, tuple(TensorSpec(name, shape) for name, shape in tensors), self.trained)


def stages_of_block(spec: Spec, block: int) -> list[Stage]:
    """The stages that a visit of ``block`` needs, in the order in which data passes them."""
    method = spec.diffusion_blocks

    def stage(kind: StageKind, sharing: Sharing, index: int, suffix: str = "") -> Stage:
        prefix = f"block{block:02d}." if sharing == "private" else ""
        return Stage(f"{prefix}{kind}{suffix}", kind, sharing, index)

    own_stem = block if method.stem == "private" else 0
    own_head = block if method.head == "private" else 0
    first_layer = 1 + 2 * spec.num_blocks
    return [
        stage("codebook", method.codebook, 0),
        stage("stem", method.stem, 1 + own_stem),
        *(stage("layer", "private", first_layer + layer, f"{layer:03d}") for layer in spec.layers_of(block)),
        stage("head", method.head, 1 + spec.num_blocks + own_head),
    ]


def group_of_block(spec: Spec, block: int) -> str:
    """The commit group that a visit of ``block`` changes."""
    return SHARED_GROUP if spec.diffusion_blocks.has_shared else f"block{block:02d}"


def groups(spec: Spec) -> dict[str, list[Stage]]:
    """{group: its trained stages}, each stage once."""
    found: dict[str, dict[str, Stage]] = {}
    for block in range(spec.num_blocks):
        members = found.setdefault(group_of_block(spec, block), {})
        members.update({stage.name: stage for stage in stages_of_block(spec, block) if stage.trained})
    return {group: list(members.values()) for group, members in found.items()}


def frozen(spec: Spec) -> list[Stage]:
    """The stages that nothing trains."""
    found = {s.name: s for block in range(spec.num_blocks) for s in stages_of_block(spec, block) if not s.trained}
    return list(found.values())


def largest_block(spec: Spec, shapes: Shapes) -> list[StageLayout]:
    """The layouts of block 0, which has as many layers as any."""
    return [stage.layout(shapes) for stage in stages_of_block(spec, 0)]
