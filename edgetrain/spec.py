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
    """The architecture. ``image_shape`` (channels, height, width) and ``num_classes`` come from the data."""

    family: Literal["vit"] = "vit"
    width: int = 64
    depth: int = 6
    heads: int = 4
    patch: int = 4
    mlp_ratio: int = 4
    image_shape: tuple[int, ...] = ()
    num_classes: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch", "mlp_ratio"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        _require(self.width % self.heads == 0, f"model.width {self.width} is not divisible by {self.heads} heads")
        if self.image_shape:
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
    sigma_data: float = 0.0  # 0: 1 / sqrt(width), the deviation of one element of a unit row
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
        _require(
            not (self.auxiliary and self.streams == 1),
            "diffusion_blocks.auxiliary needs streams = 2: with one stream the image tokens have seen the noisy label",
        )
        self.noise  # noqa: B018  (checks the noise levels)

    @property
    def noise(self) -> NoiseSchedule:
        return NoiseSchedule(self.num_blocks, self.sigma_min, self.sigma_max, self.p_mean, self.p_std, self.overlap)

    @property
    def has_shared(self) -> bool:
        """Whether blocks are coupled: then they all form one commit group."""
        return "shared" in (self.stem, self.head, self.codebook)


PRESETS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "paper": {
        "sigma_min": 0.002, "sigma_max": 80.0, "p_mean": -1.2, "p_std": 1.2, "overlap": 0.05, "sigma_data": 0.5,
        "streams": 1, "skip": True, "gate": 0.0, "stem": "shared", "head": "shared", "codebook": "shared",
    },
}  # fmt: skip


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled decay, linear warm-up, cosine to ``final_lr`` times the peak."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0
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
    """How long, in what pieces. ``steps`` is the total for each block; ``micro_batch = 0`` is chosen at creation."""

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
class Spec:
    """Everything that decides a number of the training. Memory choices are no part of it, save the micro-batch."""

    data: DataSpec = field(default_factory=DataSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    diffusion_blocks: DiffusionBlocksSpec = field(default_factory=DiffusionBlocksSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    train: TrainSpec = field(default_factory=TrainSpec)

    def __post_init__(self) -> None:
        blocks, depth = self.diffusion_blocks.num_blocks, self.model.depth
        _require(blocks <= depth, f"{blocks} blocks cannot be cut from {depth} layers", "Lower num_blocks.")

    @property
    def num_blocks(self) -> int:
        return self.diffusion_blocks.num_blocks

    @property
    def sigma_data(self) -> float:
        return self.diffusion_blocks.sigma_data or self.model.width**-0.5

    def layers_of(self, block: int) -> range:
        """The layers of ``block``: consecutive, the earlier blocks one longer where it does not divide."""
        size, rest = divmod(self.model.depth, self.num_blocks)
        start = block * size + min(block, rest)
        return range(start, start + size + (block < rest))


Changes = Mapping[str, Any]
_TABLES = {f.name: typing.get_type_hints(Spec)[f.name] for f in dataclasses.fields(Spec)}

# What may be changed on a session that exists: nothing in it decides a shape or what has been drawn before.
RESUMABLE_TABLES = ("optimizer",)
RESUMABLE_KEYS = ("train.steps", "train.visit_steps", "train.order", "data.source")


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
    if "diffusion_blocks" in merged:
        written = merged["diffusion_blocks"]
        preset = written.get("preset", "calibrated")
        _require(isinstance(preset, str), f"diffusion_blocks.preset is {preset!r}, which is no name")
        _known(preset, PRESETS, "preset")
        merged["diffusion_blocks"] = {**PRESETS[preset], **written}
    return Spec(**{table: _build(_TABLES[table], table, merged.get(table, {})) for table in _TABLES})


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
    if typing.get_origin(hint) is tuple:
        good = isinstance(value, (list, tuple)) and all(type(item) is int and item > 0 for item in value)
        _require(good and len(value) in (0, 3), f"{dotted} is {value!r}", "It must be [channels, height, width].")
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
