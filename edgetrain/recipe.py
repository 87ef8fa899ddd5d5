"""Recipes: TOML whose tables resolve into a ``Spec``, and back.

``--set table.key=value`` overrides one key. A preset of ``[diffusion_blocks]`` is a set of defaults for that table,
which single keys may override.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from edgetrain.errors import UsageError
from edgetrain.spec import (
    PRESETS,
    DataSpec,
    LanguageModelSpec,
    ModelSpec,
    Spec,
    StackDataSpec,
    StackSpec,
    TextModelSpec,
    TextSpec,
    require,
)

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


def resolve(recipe: Mapping[str, Any], changes: Changes | None = None, *, is_complete: bool = False) -> Spec:
    """The spec of a recipe (tables of keys) with ``changes`` ({"table.key": value}) applied over it.

    ``is_complete``: it is what ``to_toml`` wrote, maybe long ago; a key that there was not yet has its default, not
    what presets have come to say of it.

    Raises:
        UsageError: an unknown table or key (the nearest is named), a value of the wrong type or out of range.
    """
    merged: dict[str, dict[str, Any]] = {}
    for table, keys in recipe.items():
        _known(table, _TABLES, "table")
        require(isinstance(keys, Mapping), f"{table} is a table of the recipe, not a value", f"Write [{table}].")
        merged[table] = dict(keys)
    for dotted, value in (changes or {}).items():
        table, _, key = dotted.partition(".")
        require(bool(key), f"{dotted!r} names no key", "Write table.key, as in train.batch_size.")
        _known(table, _TABLES, "table")
        merged.setdefault(table, {})[key] = value
    family = merged.get("model", {}).get("family", "vit")
    require(isinstance(family, str), f"model.family is {family!r}, which is no name")
    _known(family, _FAMILIES, "model.family")
    presets = PRESETS.get(family, PRESETS["vit"])
    written = merged.get("diffusion_blocks", {})
    preset = written.get("preset", "calibrated")
    require(isinstance(preset, str), f"diffusion_blocks.preset is {preset!r}, which is no name")
    _known(preset, presets, "preset")
    merged["diffusion_blocks"] = {**({} if is_complete else presets[preset]), **written}
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
        require(fits, f"{dotted} is {value!r}", f"It must be one of {', '.join(map(repr, choices))}.")
        return value
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str:
        good = isinstance(value, (list, tuple)) and all(type(item) is str and item for item in value)
        require(good, f"{dotted} is {value!r}", "It must be a list of names.")
        return tuple(value)
    if typing.get_origin(hint) is tuple:
        good = isinstance(value, (list, tuple)) and all(type(item) is int and item >= 0 for item in value)
        require(good, f"{dotted} is {value!r}", "It must be a list of numbers.")
        return tuple(value)
    if hint is float and type(value) is int:
        value = float(value)
    require(type(value) is hint, f"{dotted} is {value!r}, which is no {hint.__name__}")
    require(hint is not float or math.isfinite(value), f"{dotted} is {value!r}, which is not finite")
    return value


def parse_changes(assignments: tuple[str, ...]) -> dict[str, Any]:
    """``("train.batch_size=32",)`` -> ``{"train.batch_size": 32}``; values as in TOML, bare words as strings."""
    changes = {}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        require(bool(equals), f"{assignment!r} sets nothing", "Write --set table.key=value.")
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
