"""What a session trains: the recipe as written, checked and resolved into frozen dataclasses.

A recipe is TOML with the tables below; ``--set table.key=value`` overrides one key. A preset of
``[diffusion_blocks]`` is a set of defaults for that table, which single keys may override.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from edgetrain.errors import UsageError
from edgetrain.noise import NoiseSchedule

Sharing = Literal["private", "shared", "frozen"]


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise UsageError(message, hint)


@dataclass(frozen=True)
class ModelSpec:
    """The architecture: a classifier of images (vit), or a generator of images of a class (dit).

    ``image_shape`` (channels, height, width) and ``num_classes`` come from the data. ``class_dropout``: the part of a
    dit's training images whose class is withheld, for guidance without a classifier.
    """

    family: Literal["vit", "dit"] = "vit"
    width: int = 64
    depth: int = 6
    heads: int = 4
    patch: int = 4
    mlp_ratio: int = 4
    class_dropout: float = 0.1
    image_shape: tuple[int, ...] = ()
    num_classes: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch", "mlp_ratio"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        _require(self.width % self.heads == 0, f"model.width {self.width} is not divisible by {self.heads} heads")
        _require(
            0 <= self.class_dropout < 1, f"model.class_dropout is {self.class_dropout}, not at least 0 and below 1"
        )
        if self.image_shape:
            _require(
                len(self.image_shape) == 3 and min(self.image_shape) > 0,
                f"model.image_shape is {list(self.image_shape)}",
                "It must be [channels, height, width].",
            )
            _, height, width = self.image_shape
            _require(
                height % self.patch == 0 and width % self.patch == 0,
                f"images of {height}x{width} pixels do not divide into patches of {self.patch}x{self.patch}",
                f"Set model.patch to a divisor of {height} and {width}.",
            )

    @property
    def num_patches(self) -> int:
        _, height, width = self.image_shape
        return (height // self.patch) * (width // self.patch)


@dataclass(frozen=True)
class LanguageModelSpec:
    """A causal language model, as ``checkpoint.read_config`` finds it in a Hugging Face folder.

    ``architecture`` is the class that transformers calls it; Llama, Mistral, Qwen2 and Qwen3 are one family, told
    apart by ``qkv_bias``, ``out_bias``, ``mlp_bias``, ``qk_norm`` and ``sliding_window`` (0: none). ``tied``: the
    embedding is the output matrix too. The ``rope_`` fields with ``rope_scaling`` "linear" use ``rope_factor`` alone,
    with "llama3" all of them; gpt2 has learned positions and uses none.
    """

    family: Literal["llama", "gpt2"] = "llama"
    architecture: Literal[
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"
    ] = "LlamaForCausalLM"
    vocab_size: int = 0
    width: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    mlp_width: int = 256
    max_length: int = 2048
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu_new", "gelu"] = "silu"
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    rope_theta: float = 10000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width", "max_length"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        _require(self.heads % self.kv_heads == 0, f"{self.heads} attention heads cannot share {self.kv_heads} of keys")
        _require(
            self.family == "llama" or self.heads * self.head_dim == self.width,
            f"model.width {self.width} is not {self.heads} heads of {self.head_dim}",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim {self.head_dim} is odd: rotary positions need pairs")
        _require(self.sliding_window >= 0, f"model.sliding_window {self.sliding_window} is negative")
        for name in ("norm_eps", "rope_theta", "rope_factor"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive")


@dataclass(frozen=True)
class TextModelSpec:
    """A language model that is trained from the beginning.

    masked: tokens are unmasked in any order (MD4, arXiv 2406.04329). ar: one after the other. recurrent: likewise, by
    a core of ``depth`` layers that runs again and again between ``prelude`` and ``coda`` layers (arXiv 2502.05171);
    exact training runs it ``loops`` times, and back through the last ``backprop_loops`` of them (0: all).

    ``tokenizer``: "bytes", or a folder with tokenizer.json; ``vocab_size`` follows from it. ``previous``: with
    diffusion_blocks, a noisy token of ar is also given the embedding of the token before it.
    """

    family: Literal["masked", "ar", "recurrent"] = "ar"
    tokenizer: str = "bytes"
    vocab_size: int = 0
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 3
    rope_theta: float = 10000.0
    prelude: int = 1
    coda: int = 1
    loops: int = 8
    backprop_loops: int = 0
    previous: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_ratio", "prelude", "coda", "loops"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        _require(self.width % self.heads == 0, f"model.width {self.width} is not divisible by {self.heads} heads")
        _require(self.head_dim % 2 == 0, f"a head's width {self.head_dim} is odd: rotary positions need pairs")
        _require(self.rope_theta > 0, "model.rope_theta must be positive")
        _require(
            0 <= self.backprop_loops <= self.loops,
            f"model.backprop_loops {self.backprop_loops} is not between 0 and {self.loops} loops",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class TextSpec:
    """Text to train a language model on, tokenised once.

    ``length`` is that of a training example in tokens. ``packing``: documents follow each other, an end-of-text token
    between, and are cut into examples; without it each document is an example of its own, padded. ``held_out`` is the
    part of the documents that is kept for ``evaluate``.
    """

    source: str = ""
    length: int = 256
    packing: bool = True
    held_out: float = 0.05

    def __post_init__(self) -> None:
        _require(self.length >= 1, f"data.length must be at least 1 token, it is {self.length}")
        _require(0 <= self.held_out < 1, f"data.held_out must be at least 0 and below 1, it is {self.held_out}")


@dataclass(frozen=True)
class StackSpec:
    """A model of somebody's own: ``depth`` blocks, and a stem and a head that have parameters or not. ``order``: which
    block runs when; empty: each once."""

    family: Literal["stack"] = "stack"
    depth: int = 1
    order: tuple[int, ...] = ()
    stem: bool = True
    head: bool = True

    def __post_init__(self) -> None:
        _require(self.depth >= 1, f"model.depth must be at least 1, it is {self.depth}")
        _require(
            not self.order or set(self.order) == set(range(self.depth)),
            f"model.order {list(self.order)} does not run each of the {self.depth} blocks",
        )


@dataclass(frozen=True)
class StackDataSpec:
    """``source`` is the FILE.py:FUNCTION that builds the model and gives its data."""

    source: str = ""


@dataclass(frozen=True)
class DataSpec:
    """Where the examples come from, and how training images are varied."""

    source: str = "digits"
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source names no data", "Give a path with --data.")
        _require(self.shift >= 0, f"data.shift must be at least 0 pixels, it is {self.shift}")


@dataclass(frozen=True)
class DiffusionBlocksSpec:
    """The method (Shing et al., arXiv 2506.14202): noise levels, conditioning, and what blocks share.

    ``streams = 2``: image tokens never see the noisy token and take a learned constant as condition;
    ``skip``: logits are read from D = c_skip z + c_out F instead of from the network's output;
    ``gate``: the value at which the gates of adaptive layer norm start;
    ``auxiliary``: weight of a cross-entropy on the mean of the image tokens (calibrated, two streams only).
    """

    preset: Literal["calibrated", "paper"] = "calibrated"
    num_blocks: int = 3
    sigma_min: float = 0.05
    sigma_max: float = 20.0
    p_mean: float = 0.0
    p_std: float = 1.2
    overlap: float = 0.05
    sigma_data: float = 0.0  # 0: 1 / sqrt(width), the deviation of one element of a unit row; dit .5
    streams: Literal[1, 2] = 2
    skip: bool = False
    gate: float = 0.5
    auxiliary: float = 0.0
    stem: Sharing = "private"
    head: Sharing = "private"
    codebook: Literal["frozen", "shared"] = "frozen"

    def __post_init__(self) -> None:
        _require(self.sigma_data >= 0, f"diffusion_blocks.sigma_data must be at least 0, it is {self.sigma_data}")
        _require(self.auxiliary >= 0, f"diffusion_blocks.auxiliary must be at least 0, it is {self.auxiliary}")
        self.noise  # noqa: B018  (checks the noise levels)

    @property
    def noise(self) -> NoiseSchedule:
        return NoiseSchedule(self.num_blocks, self.sigma_min, self.sigma_max, self.p_mean, self.p_std, self.overlap)

    @property
    def has_shared(self) -> bool:
        """Whether blocks are coupled: then they all form one commit group."""
        return "shared" in (self.stem, self.head, self.codebook)


_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "p_mean": -1.2, "p_std": 1.2, "overlap": 0.05, "streams": 1, "skip": True,
    "gate": 0.0,
}  # fmt: skip
_SHARED = {"stem": "shared", "head": "shared", "codebook": "shared"}
_NEXT_TOKEN = {"sigma_min": 0.1, "sigma_max": 10.0, "p_mean": -0.5, "p_std": 0.8, "overlap": 0.1}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "calibrated": {},
        "paper": {**_EDM, **_SHARED, "sigma_data": 0.5},
    },
    "dit": {"calibrated": _EDM, "paper": {**_EDM, "stem": "shared", "head": "shared"}},
    "masked": {"calibrated": {}, "paper": {"gate": 0.0, "stem": "shared", "head": "shared"}},
    "ar": {
        "calibrated": _NEXT_TOKEN,
        "paper": {**_EDM, **_SHARED, "overlap": 0.1, "sigma_data": 0.5},
    },
    "recurrent": {
        "calibrated": {**_NEXT_TOKEN, "num_blocks": 1},
        "paper": {**_EDM, **_SHARED, "overlap": 0.1, "sigma_data": 0.5, "num_blocks": 1},
    },
}
"""By model.family: what a preset sets of [diffusion_blocks]."""


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled decay, linear warm-up, then cosine or linear to ``final_lr`` times the peak, or constant.

    ``clip`` bounds a gradient norm. ``clip_over`` "layer": of each layer alone (diffusion_blocks: of each block);
    "global": of the whole model, whose gradients then wait on disk until the last is known (exact).
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0
    clip_over: Literal["layer", "global"] = "layer"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.02

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            _require(0 < getattr(self, name) < math.inf, f"optimizer.{name} must be positive")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} must be at least 0 and below 1")
        for name in ("warmup", "final_lr"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name} must lie between 0 and 1")
        _require(self.weight_decay >= 0, "optimizer.weight_decay must be at least 0")


@dataclass(frozen=True)
class TrainSpec:
    """By what objective, how long, in what pieces.

    ``steps`` is the total for each block (exact: of the model); ``micro_batch = 0`` is chosen by the first plan.
    """

    objective: Literal["diffusion_blocks", "exact"] = "diffusion_blocks"
    steps: int = 1000
    batch_size: int = 64
    micro_batch: int = 0
    visit_steps: int = 50
    order: Literal["ascending", "descending"] = "ascending"  # of sigma: ascending ends each cycle on block 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "visit_steps"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1, it is {getattr(self, name)}")
        _require(
            0 <= self.micro_batch <= self.batch_size,
            f"train.micro_batch {self.micro_batch} is not between 1 and the batch size {self.batch_size}",
        )
        _require(0 <= self.seed < 2**63, f"train.seed {self.seed} is not between 0 and 2^63 - 1")


@dataclass(frozen=True)
class ExactSpec:
    """What the exact objective trains of a model.

    ``train`` "all": every parameter, but for the token embedding (and an output matrix tied to it) without
    ``embedding``; "last": those of the last ``last_layers`` layers and of the head (of a language model, the final
    norm); "lora": low-rank adapters (Hu et al., arXiv 2106.09685) of the linear maps that ``targets`` name (none: those
    of queries and values). ``weights``: how trained weights are stored, "bf16" with stochastic rounding. ``compute``:
    what products are rounded to; sums, gradients in store and moments are fp32.
    """

    train: Literal["all", "last", "lora"] = "all"
    last_layers: int = 1
    embedding: bool = True
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    weights: Literal["fp32", "bf16"] = "fp32"
    compute: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("last_layers", "rank"):
            _require(getattr(self, name) >= 1, f"exact.{name} must be at least 1, it is {getattr(self, name)}")
        _require(0 < self.alpha < math.inf, f"exact.alpha must be positive, it is {self.alpha}")
        _require(0 <= self.dropout < 1, f"exact.dropout must be at least 0 and below 1, it is {self.dropout}")


@dataclass(frozen=True)
class Spec:
    """Everything that decides a number of the training. Memory choices are no part of it, save the micro-batch."""

    data: DataSpec | TextSpec | StackDataSpec = field(default_factory=DataSpec)
    model: ModelSpec | LanguageModelSpec | TextModelSpec | StackSpec = field(default_factory=ModelSpec)
    diffusion_blocks: DiffusionBlocksSpec = field(default_factory=DiffusionBlocksSpec)
    exact: ExactSpec = field(default_factory=ExactSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    train: TrainSpec = field(default_factory=TrainSpec)

    def __post_init__(self) -> None:
        depth = self.model.depth
        if self.is_exact:
            _require(
                self.exact.last_layers <= depth or self.exact.train != "last",
                f"exact.last_layers is {self.exact.last_layers}, and the model has {depth} layers",
            )
            _require(
                self.exact.train != "lora" or isinstance(self.model, LanguageModelSpec),
                f"LoRA is there for language models, not for {self.model.family!r}",
                "Set exact.train to all or last.",
            )
        else:
            blocks = self.diffusion_blocks.num_blocks
            _require(
                isinstance(self.model, (ModelSpec, TextModelSpec)),
                f"{self.model.family!r} is trained by the exact objective",
                'Set train.objective to "exact".',
            )
            method = self.diffusion_blocks
            _require(
                not (method.auxiliary and method.streams == 1),
                "diffusion_blocks.auxiliary needs streams = 2: with one stream what is clean has seen the noise",
                "Set diffusion_blocks.auxiliary = 0, or streams = 2.",
            )
            _require(
                method.head != "frozen",
                "a frozen head reads nothing out: it begins at zero",
                "Set diffusion_blocks.head to private or shared.",
            )
            _require(
                self.model.family != "dit" or (method.streams == 1 and method.skip and not method.auxiliary),
                "an image is denoised by D = c_skip z + c_out F, in one stream and without an auxiliary loss",
                "Leave out diffusion_blocks.streams, skip and auxiliary for the family dit.",
            )
            _require(
                self.model.family not in ("masked", "recurrent") or not method.auxiliary,
                f"there is no auxiliary loss for the family {self.model.family!r}",
                "Leave out diffusion_blocks.auxiliary.",
            )
            _require(
                self.model.family != "recurrent" or blocks == 1,
                f"a recurrent core is one block, not {blocks}",
                "Set diffusion_blocks.num_blocks = 1.",
            )
            _require(blocks <= depth, f"{blocks} blocks cannot be cut from {depth} layers", "Lower num_blocks.")
        if isinstance(self.model, LanguageModelSpec) and isinstance(self.data, TextSpec):
            _require(
                self.data.length <= self.model.max_length,
                f"data.length is {self.data.length} tokens, and the model takes at most {self.model.max_length}",
                "Lower data.length.",
            )

    @property
    def is_exact(self) -> bool:
        return self.train.objective == "exact"

    @property
    def image_model(self) -> ModelSpec:
        """The model, of a family that data of images decides."""
        assert isinstance(self.model, ModelSpec)
        return self.model

    @property
    def images(self) -> DataSpec:
        assert isinstance(self.data, DataSpec)
        return self.data

    @property
    def language(self) -> LanguageModelSpec:
        assert isinstance(self.model, LanguageModelSpec)
        return self.model

    @property
    def text_model(self) -> TextModelSpec:
        assert isinstance(self.model, TextModelSpec)
        return self.model

    @property
    def text(self) -> TextSpec:
        assert isinstance(self.data, TextSpec)
        return self.data

    @property
    def num_blocks(self) -> int:
        """How many parts are trained apart from each other: with exact gradients, one."""
        return 1 if self.is_exact else self.diffusion_blocks.num_blocks

    @property
    def sigma_data(self) -> float:
        assert isinstance(self.model, (ModelSpec, TextModelSpec))
        return self.diffusion_blocks.sigma_data or (0.5 if self.model.family == "dit" else self.model.width**-0.5)

    @property
    def codebook_rows(self) -> int:
        """Of the codebook whose rows diffusion_blocks noises; 0 where it noises something else."""
        if self.model.family == "vit":
            return self.image_model.num_classes
        return self.text_model.vocab_size if self.model.family in ("ar", "recurrent") else 0

    @property
    def tokens_per_example(self) -> int:
        """Of an image, its patches."""
        return self.image_model.num_patches if isinstance(self.model, ModelSpec) else self.text.length

    def layers_of(self, block: int) -> range:
        """The layers of ``block``: consecutive, the earlier blocks one longer where it does not divide."""
        size, rest = divmod(self.model.depth, self.num_blocks)
        start = block * size + min(block, rest)
        return range(start, start + size + (block < rest))


Changes = Mapping[str, Any]
_TABLES = {f.name: typing.get_type_hints(Spec)[f.name] for f in dataclasses.fields(Spec)}
# By model.family, what its tables [model] and [data] are.
_FAMILIES: dict[str, tuple[type, type]] = {
    "vit": (ModelSpec, DataSpec),
    "dit": (ModelSpec, DataSpec),
    "masked": (TextModelSpec, TextSpec),
    "ar": (TextModelSpec, TextSpec),
    "recurrent": (TextModelSpec, TextSpec),
    "llama": (LanguageModelSpec, TextSpec),
    "gpt2": (LanguageModelSpec, TextSpec),
    "stack": (StackSpec, StackDataSpec),
}

# What may be changed on a session that exists: nothing in it decides a shape or what has been drawn before.
RESUMABLE_TABLES = ("optimizer",)
RESUMABLE_KEYS = (
    "train.steps", "train.visit_steps", "train.order", "data.source", "data.length", "data.packing", "data.held_out",
    "exact.compute",
)  # fmt: skip


def resolve(recipe: Mapping[str, Any], changes: Changes | None = None) -> Spec:
    """The spec of a recipe (tables of keys) with ``changes`` ({"table.key": value}) applied over it.

    Raises:
        UsageError: an unknown table or key (the nearest is named), a value of the wrong type or out of range.
    """
    merged: dict[str, dict[str, Any]] = {}
    for table, keys in recipe.items():
        _known(table, _TABLES, "table")
        _require(isinstance(keys, Mapping), f"{table} is a table of the recipe, not a value", f"Write [{table}].")
        merged[table] = dict(keys)
    for dotted, value in (changes or {}).items():
        table, _, key = dotted.partition(".")
        _require(bool(key), f"{dotted!r} names no key", "Write table.key, as in train.batch_size.")
        _known(table, _TABLES, "table")
        merged.setdefault(table, {})[key] = value
    family = merged.get("model", {}).get("family", "vit")
    _require(isinstance(family, str), f"model.family is {family!r}, which is no name")
    _known(family, _FAMILIES, "model.family")
    presets = PRESETS.get(family, PRESETS["vit"])
    written = merged.get("diffusion_blocks", {})
    preset = written.get("preset", "calibrated")
    _require(isinstance(preset, str), f"diffusion_blocks.preset is {preset!r}, which is no name")
    _known(preset, presets, "preset")
    merged["diffusion_blocks"] = {**presets[preset], **written}
    classes = {**_TABLES, **dict(zip(("model", "data"), _FAMILIES[family], strict=True))}
    return Spec(**{table: _build(classes[table], table, merged.get(table, {})) for table in classes})


def _known(name: str, names: Mapping[str, Any], what: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.5)
        raise UsageError(
            f"unknown {what} {name!r}" + (f": did you mean {near[0]!r}?" if near else ""),
            f"Known: {', '.join(names)}.",
        )


def _build(cls: type, table: str, keys: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    for key in keys:
        _known(f"{table}.{key}", {f"{table}.{name}": None for name in hints}, "key")
    return cls(**{key: _checked(f"{table}.{key}", value, hints[key]) for key, value in keys.items()})


def _checked(dotted: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        fits = any(type(value) is type(choice) and value == choice for choice in choices)
        _require(fits, f"{dotted} is {value!r}", f"It must be one of {', '.join(map(repr, choices))}.")
        return value
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str:
        good = isinstance(value, (list, tuple)) and all(type(item) is str and item for item in value)
        _require(good, f"{dotted} is {value!r}", "It must be a list of names.")
        return tuple(value)
    if typing.get_origin(hint) is tuple:
        good = isinstance(value, (list, tuple)) and all(type(item) is int and item >= 0 for item in value)
        _require(good, f"{dotted} is {value!r}", "It must be a list of numbers.")
        return tuple(value)
    if hint is float and type(value) is int:
        value = float(value)
    _require(type(value) is hint, f"{dotted} is {value!r}, which is no {hint.__name__}")
    _require(hint is not float or math.isfinite(value), f"{dotted} is {value!r}, which is not finite")
    return value


def parse_changes(assignments: tuple[str, ...]) -> dict[str, Any]:
    """``("train.batch_size=32",)`` -> ``{"train.batch_size": 32}``; values as in TOML, bare words as strings."""
    changes = {}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        _require(bool(equals), f"{assignment!r} sets nothing", "Write --set table.key=value.")
        try:
            changes[dotted.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[dotted.strip()] = text.strip()
    return changes


def builtin_recipes() -> dict[str, str]:
    """The recipes that come with edgetrain: name -> TOML text."""
    folder = resources.files("edgetrain") / "recipes"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name.removesuffix(".toml"): (folder / name).read_text() for name in names}


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The tables of a built-in recipe or of a TOML file."""
    builtin = builtin_recipes()
    if name_or_path in builtin:
        return tomllib.loads(builtin[name_or_path])
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        _known(name_or_path, builtin, "recipe")
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"the recipe {name_or_path} cannot be read: {error}", f"Built in: {', '.join(builtin)}."
        ) from error


def needs_import(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe says how to train a model that comes from elsewhere."""
    train = recipe.get("train", {})
    return isinstance(train, Mapping) and train.get("objective") == "exact" and "model" not in recipe


def to_toml(spec: Spec) -> str:
    """The resolved spec as a recipe that ``resolve`` turns into an equal spec."""
    lines = []
    for table, section in dataclasses.asdict(spec).items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in section.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)


def difference(old: Spec, new: Spec) -> dict[str, tuple[Any, Any]]:
    """{"table.key": (old, new)} of every key that differs."""
    return {
        f"{table.name}.{key.name}": (getattr(a, key.name), getattr(b, key.name))
        for table in dataclasses.fields(Spec)
        for a, b in [(getattr(old, table.name), getattr(new, table.name))]
        for key in dataclasses.fields(a)
        if getattr(a, key.name) != getattr(b, key.name)
    }
