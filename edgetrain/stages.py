"""Which stages a spec has, who trains them, and what is committed together. No torch here.

The exact objective trains all that it trains together: its stages are one commit group. With diffusion_blocks a block
is visited with its stem, its layers, its head and, where rows of one are noised, the codebook. Private stages belong to
one block, shared ones are trained by every visit, frozen ones by none. Blocks that share nothing are a commit group
each, so that one can be trained on a machine of its own; as soon as anything is shared, all trained stages form one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetrain.spec import LanguageModelSpec, Sharing, Spec, StackSpec, TextModelSpec
from edgetrain.store.layout import StageLayout, TensorSpec

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""{stage kind: {parameter name: shape}}: what the family's modules hold."""

SHARED_GROUP = "all"
EXACT_GROUP = "model"

_CHUNK_BYTES = 8 << 20
_USE_BITS = 32  # more than stages have indices
_INDICES_OF_TABLE = 1 << 20  # more than a model has layers, or a table stages


@dataclass(frozen=True)
class Stage:
    """``index`` numbers the stages of a spec: it keys the stage's initial values. ``dtype`` is that of its weights."""

    name: str
    kind: str
    sharing: Sharing
    index: int
    dtype: str = "F32"

    @property
    def trained(self) -> bool:
        return self.sharing != "frozen"

    def layout(self, shapes: Shapes) -> StageLayout:
        tensors = sorted((name, tuple(shape)) for name, shape in shapes[self.kind].items())
        tensor_specs = (TensorSpec(name, shape, self.dtype) for name, shape in tensors)
        return StageLayout(self.name, tuple(tensor_specs), self.trained)


@dataclass(frozen=True)
class Unit:
    """Stages whose tensors make up one module: a layer, its weights and its adapter. ``kind`` tells which module."""

    kind: str
    stages: tuple[Stage, ...]

    @property
    def trained(self) -> bool:
        return any(stage.trained for stage in self.stages)


@dataclass(frozen=True)
class ExactStages:
    """The stages of a model that is trained by exact gradients, in order of data.

    A language model looks its tokens up in the table ``embedding`` (vocab_size, width) before the stem, and after the
    head multiplies with the table ``output``, the same where they are tied. These are never resident as a whole: each
    is cut into stages of ``rows_of_chunk`` rows. Without them the head makes the loss.

    A unit may stand several times among ``layers``: it runs as often, with the same weights. Gradients flow from the
    last layer back to number ``backprop_from``; what all layers read has gradients of these alone.

    ``tileable``: the layers can multiply with matrices that are not in memory as a whole.
    """

    stem: Unit
    layers: tuple[Unit, ...]
    head: Unit
    embedding: tuple[Unit, ...] = ()
    output: tuple[Unit, ...] = ()
    backprop_from: int = 0
    tileable: bool = False

    def random_index(self, position: int) -> int:
        """The index that keys what a layer draws at random: that of its stage, another one each time that it runs."""
        unit = self.layers[position]
        return unit.stages[-1].index + (self.layers[:position].count(unit) << _USE_BITS)

    @property
    def is_looped(self) -> bool:
        """Whether a layer runs more than once."""
        return len(set(self.layers)) < len(self.layers)

    @property
    def units(self) -> tuple[Unit, ...]:
        """Each once."""
        return tuple(dict.fromkeys([*self.embedding, self.stem, *self.layers, self.head, *self.output]))

    @property
    def stages(self) -> list[Stage]:
        return [stage for unit in self.units for stage in unit.stages]

    @property
    def in_tiles(self) -> list[Stage]:
        """Whose larger matrices may pass through memory tile by tile: the layers, without their adapters."""
        layers = dict.fromkeys(self.layers) if self.tileable else ()
        return [stage for unit in layers for stage in unit.stages if stage.kind == unit.kind]


def rows_of_chunk(width: int) -> int:
    """Rows of a table that are resident together. A function of the width alone: the cut decides how sums round."""
    return max(64, _CHUNK_BYTES // (4 * width))


def exact_stages(spec: Spec) -> ExactStages:
    """What the exact objective trains, and what is frozen beside it."""
    model, exact, depth = spec.model, spec.exact, spec.model.depth
    dtype = "BF16" if exact.weights == "bf16" else "F32"

    def stage(name: str, kind: str, index: int, trained: bool) -> Stage:
        return Stage(name, kind, "private" if trained else "frozen", index, dtype if trained else "F32")

    def layer(number: int) -> Unit:
        trained = exact.train == "all" or (exact.train == "last" and number >= depth - exact.last_layers)
        kind = f"layer{number:03d}" if isinstance(model, StackSpec) else "layer"
        stages = [stage(f"layer{number:03d}", kind, 2 + number, trained)]
        if exact.train == "lora":
            stages.append(stage(f"layer{number:03d}.lora", "lora", 4 + depth + number, True))
        return Unit(kind, tuple(stages))

    def table(name: str, index: int, trained: bool) -> tuple[Unit, ...]:
        """A last stage that is shorter is of a kind of its own."""
        assert isinstance(model, LanguageModelSpec)
        full, rest = divmod(model.vocab_size, rows_of_chunk(model.width))
        kinds = [name] * full + [f"{name}.last"] * bool(rest)
        first = index * _INDICES_OF_TABLE
        stages = [stage(f"{name}.{i:03d}", kind, first + i, trained) for i, kind in enumerate(kinds)]
        return tuple(Unit(one.kind, (one,)) for one in stages)

    has_stem = model.stem if isinstance(model, StackSpec) else model.family != "llama"
    has_head = model.head if isinstance(model, StackSpec) else True
    everything = exact.train == "all"
    stem = (stage("stem", "stem", 1, everything),) if has_stem else ()
    head = (stage("head", "head", 2 + depth, exact.train != "lora"),) if has_head else ()
    embedding: tuple[Unit, ...] = ()
    output: tuple[Unit, ...] = ()
    if isinstance(model, LanguageModelSpec):
        embedding = table("embedding", 1, everything and exact.embedding)
        output = embedding if model.tied else table("output", 2, everything)
    layers, backprop_from = tuple(map(layer, range(depth))), 0
    if isinstance(model, StackSpec) and model.order:
        layers = tuple(layers[number] for number in model.order)
    if isinstance(model, TextModelSpec) and model.family == "recurrent":
        core = (Unit("adapter", (stage("adapter", "adapter", 3 + depth, everything),)), *layers)
        layers = core * model.loops
        backprop_from = len(core) * (model.loops - model.backprop_loops) if model.backprop_loops else 0
    tileable = isinstance(model, LanguageModelSpec)
    return ExactStages(Unit("stem", stem), layers, Unit("head", head), embedding, output, backprop_from, tileable)


def stages_of_block(spec: Spec, block: int) -> list[Stage]:
    """The stages that a visit of ``block`` needs, in the order in which data passes them."""
    if spec.is_exact:
        return exact_stages(spec).stages
    method = spec.diffusion_blocks

    def stage(kind: str, sharing: Sharing, index: int, suffix: str = "") -> Stage:
        prefix = f"block{block:02d}." if sharing == "private" else ""
        return Stage(f"{prefix}{kind}{suffix}", kind, sharing, index)

    own_stem = block if method.stem == "private" else 0
    own_head = block if method.head == "private" else 0
    first_layer = 1 + 2 * spec.num_blocks
    codebook = [stage("codebook", method.codebook, 0)] if spec.model.family in ("vit", "ar", "recurrent") else []
    adapter = [stage("adapter", "private", first_layer + spec.model.depth)] if spec.model.family == "recurrent" else []
    return [
        *codebook,
        stage("stem", method.stem, 1 + own_stem),
        *adapter,
        *(stage("layer", "private", first_layer + layer, f"{layer:03d}") for layer in spec.layers_of(block)),
        stage("head", method.head, 1 + spec.num_blocks + own_head),
    ]


def group_of_block(spec: Spec, block: int) -> str:
    """The commit group that a visit of ``block`` changes."""
    if spec.is_exact:
        return EXACT_GROUP
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
