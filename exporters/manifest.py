"""manifest.json of an export: what a host loop has to know to run it. Read without trust in what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from edgetrain import __version__
from edgetrain.errors import BadInput, EdgetrainError
from edgetrain.noise import NoiseSchedule
from edgetrain.randomness import Purpose
from edgetrain.store.disk import replace_file
from exporters.graph import STORAGES, Storage

FORMAT = "edgetrain.export"
VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx_data"
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
PREPROCESSING = "x/127.5-1"
CODEBOOK = "codebook.rows"
"""The weight whose rows are noised, of unit length where they are."""

_MAX_BYTES = 16 << 20
_MAX_BLOCKS = 1 << 12


EMBEDDING, NORM = "embedding.onnx", "norm.onnx"
STEM, HEAD = "stem.onnx", "head.onnx"


def block_file(block: int) -> str:
    return f"block{block:02d}.onnx"


def artifact_files(block: int) -> tuple[str, str, str, str]:
    """Of a block for the training API: the graphs that train, evaluate, and update, and the checkpoint."""
    names = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")
    a, b, c, d = (f"block{block:02d}.{name}" for name in names)
    return a, b, c, d


def layer_file(number: int) -> str:
    return f"layer{number:03d}.onnx"


def logits_file(chunk: int) -> str:
    return f"logits{chunk:03d}.onnx"


@dataclass(frozen=True)
class FileRecord:
    """What a file of the export holds: its size, and the SHA-256 of its content in hex."""

    bytes: int
    sha256: str


_TEXT, _TRAINING, _STACK = "text", "ort-training", "stack"


class _Kept:
    """What every manifest can do. ``KIND``: what tells it from the others in its file, if it is not the first kind."""

    KIND: ClassVar[str] = ""

    def write(self, folder: Path) -> None:
        """Writes it into ``folder``, durably, with what follows from it for readers that have no edgetrain."""
        kind = {"kind": self.KIND} if self.KIND else {}
        own: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        content = {"format": FORMAT, "version": VERSION, "edgetrain": __version__, **kind, **own, **self._derived()}
        replace_file(folder / MANIFEST, json.dumps(content, indent=1).encode())

    def _derived(self) -> dict[str, Any]:
        return {}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads and checks the manifest and the sizes of the files that it names.

        Raises:
            BadInput: the folder is no export of this kind, or not a complete one, or of a newer version.
        """
        found = read(folder)
        if not isinstance(found, cls):
            raise another(folder, found)
        return found


@dataclass(frozen=True)
class Manifest(_Kept):
    """An export. ``single_file``: the default chain in model.onnx, instead of one graph for each block.
    ``whole``: a classifier that was trained as one, without noise."""

    family: str
    digest: str
    seed: int
    single_file: bool
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    width: int
    schedule: NoiseSchedule
    files: Mapping[str, FileRecord]
    storage: Storage = "fp32"
    whole: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def _derived(self) -> dict[str, Any]:
        num_blocks = self.schedule.num_blocks
        return {
            "num_classes": self.num_classes,
            "num_blocks": num_blocks,
            "sigma_min": self.schedule.sigma_min,
            "sigma_max": self.schedule.sigma_max,
            "chain": [{"sigma": sigma, "block": block} for sigma, block in self.schedule.grid(num_blocks)],
            "preprocessing": PREPROCESSING,
            "noise": {"purpose": int(Purpose.EVALUATION_NOISE), "seed": self.seed, "scale": "sqrt(1 + sigma_max^2)"},
        }


@dataclass(frozen=True)
class LanguageManifest(_Kept):
    """An export of a language model: model.onnx with its weights beside it, or a graph for each part, and the
    tokenizer's files. ``num_chunks``: of the output table, whose logits follow each other. ``length``: of the texts in
    training, 0 where an earlier version did not say."""

    family: str
    digest: str
    single_file: bool
    num_chunks: int
    vocab_size: int
    max_length: int
    depth: int
    kv_heads: int
    head_dim: int
    files: Mapping[str, FileRecord]
    storage: Storage = "fp32"
    length: int = 0

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of the graphs, in the order of the data."""
        if self.single_file:
            return (MODEL,)
        layers = map(layer_file, range(self.depth))
        return (EMBEDDING, *layers, NORM, *map(logits_file, range(self.num_chunks)))


@dataclass(frozen=True)
class TextManifest(_Kept):
    """An export of a language model that was trained from the beginning: a graph for each block, or model.onnx alone.

    ``whole``: it was trained as one. ``layers``: of each block, those that have keys and values; none where there are
    no such inputs. ``streams``: as in training. ``loops``: how often the core of a recurrent model ran in training.
    ``length``: that of the texts in training. The mask of a masked model is the number ``vocab_size``.
    """

    KIND = _TEXT

    family: str
    digest: str
    seed: int
    single_file: bool
    whole: bool
    vocab_size: int
    width: int
    heads: int
    head_dim: int
    length: int
    layers: tuple[int, ...]
    streams: int
    loops: int
    schedule: NoiseSchedule
    files: Mapping[str, FileRecord]
    storage: Storage = "fp32"

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of the graphs, a block each."""
        return (MODEL,) if self.single_file else tuple(map(block_file, range(self.schedule.num_blocks)))


@dataclass(frozen=True)
class TrainingManifest(_Kept):
    """What onnxruntime's training API needs of each block, trained in batches of ``batch_size`` examples. ``draws``:
    what these are made of, for whoever trains; not read again here."""

    KIND = _TRAINING

    family: str
    digest: str
    num_blocks: int
    batch_size: int
    files: Mapping[str, FileRecord]
    storage: Storage = "fp32"
    draws: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StackManifest(_Kept):
    """An export of a stack of somebody's own: a graph for each part. ``order``: the numbers of blocks as they run."""

    KIND = _STACK

    family: str
    digest: str
    stem: bool
    head: bool
    order: tuple[int, ...]
    files: Mapping[str, FileRecord]
    storage: Storage = "fp32"


AnyManifest = Manifest | LanguageManifest | TextManifest | TrainingManifest | StackManifest


def another(folder: Path, found: AnyManifest) -> BadInput:
    """What to use for an export that is not of the kind that was asked for."""
    kinds: dict[type, tuple[str, str]] = {
        Manifest: ("a model of images", "Use edgetrain predict, or generate --to for a generator."),
        LanguageManifest: ("a language model", "Use edgetrain generate or evaluate."),
        TextManifest: ("a language model", "Use edgetrain generate or evaluate."),
        StackManifest: ("a model of your own", "Load it by exporters.stack_runtime.StackRunner."),
        TrainingManifest: ("what onnxruntime's training API takes", "Load it by onnxruntime.training.api."),
    }
    what, hint = kinds[type(found)]
    return BadInput(f"{folder} is an export of {what}", hint)


def read(folder: Path) -> AnyManifest:
    """Any; as ``Manifest.read``."""
    manifest = _read(folder / MANIFEST)
    for name, record in manifest.files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != record.bytes:
            size = "is missing" if actual is None else f"has {actual} bytes"
            raise BadInput(f"{folder / name} {size}, expected {record.bytes} bytes", "Copy the whole folder again.")
    return manifest


def _read(path: Path) -> AnyManifest:
    folder = path.parent
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(f"{path} has {path.stat().st_size} bytes, more than any manifest")
        content = json.loads(path.read_text())
        found, version = content["format"], content["version"]
    except OSError as error:
        hint = "Make one: edgetrain export SESSION --to DIR."
        raise BadInput(f"{folder} is no export: {path}: {error.strerror}", hint) from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} is no export: {path} is damaged or something else: {error!r}") from error
    if found != FORMAT or not isinstance(version, int):
        raise BadInput(f"{folder} is no export: {path} has the format {found!r}")
    if version > VERSION:
        raise BadInput(f"{path} has format version {version}, newer than {VERSION}", "Install a newer edgetrain.")
    try:
        if content.get("kind") == _TEXT:
            return _parse_text(content)
        if content.get("kind") == _TRAINING:
            return _parse_training(content)
        if content.get("kind") == _STACK:
            return _parse_stack(content)
        return _parse_language(content) if "vocab_size" in content else _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, EdgetrainError) as error:
        raise BadInput(f"{path} is damaged: {error!r}", "Export the session again.") from error


def _parse_language(content: Mapping[str, Any]) -> LanguageManifest:
    parsed = LanguageManifest(
        family=_is(str, content["family"]),
        digest=_is(str, content["digest"]),
        single_file=_is(bool, content["single_file"]),
        **{
            name: _positive(content[name])
            for name in ("vocab_size", "max_length", "depth", "kv_heads", "head_dim", "num_chunks")
        },
        files=_records(content),
        storage=_storage(content),
        length=_is(int, content.get("length", 0)),
    )
    if max(parsed.depth, parsed.num_chunks) > _MAX_BLOCKS:
        raise ValueError(f"{parsed.depth} layers and {parsed.num_chunks} chunks")
    if not set(parsed.graphs) < parsed.files.keys() or any(Path(name).name != name for name in parsed.files):
        raise ValueError(f"a language model in the files {sorted(parsed.files)}")
    return parsed


def _parse_text(content: Mapping[str, Any]) -> TextManifest:
    parsed = TextManifest(
        family=_is(str, content["family"]),
        digest=_is(str, content["digest"]),
        seed=_is(int, content["seed"]),
        single_file=_is(bool, content["single_file"]),
        whole=_is(bool, content["whole"]),
        **{name: _positive(content[name]) for name in ("vocab_size", "width", "heads", "head_dim", "length", "loops")},
        layers=tuple(_is(int, number) for number in content["layers"]),
        streams=_positive(content["streams"]),
        schedule=_schedule(content),
        files=_records(content),
        storage=_storage(content),
    )
    if not 0 <= parsed.seed < 2**63:
        raise ValueError(f"the seed {parsed.seed}")
    if parsed.schedule.num_blocks > _MAX_BLOCKS or not 0 <= sum(parsed.layers) < _MAX_BLOCKS or min(parsed.layers) < 0:
        raise ValueError(f"{parsed.schedule.num_blocks} blocks of {parsed.layers} layers")
    if len(parsed.layers) != len(parsed.graphs) or parsed.family not in ("masked", "ar", "recurrent"):
        raise ValueError(f"a model of the family {parsed.family!r} with {parsed.layers} layers")
    if not set(parsed.graphs) < parsed.files.keys() or any(Path(name).name != name for name in parsed.files):
        raise ValueError(f"a language model in the files {sorted(parsed.files)}")
    return parsed


def _parse_training(content: Mapping[str, Any]) -> TrainingManifest:
    parsed = TrainingManifest(
        family=_is(str, content["family"]),
        digest=_is(str, content["digest"]),
        num_blocks=_positive(content["num_blocks"]),
        batch_size=_positive(content["batch_size"]),
        files=_records(content),
    )
    blocks = range(min(parsed.num_blocks, _MAX_BLOCKS))
    if parsed.num_blocks > _MAX_BLOCKS or {n for i in blocks for n in artifact_files(i)} != parsed.files.keys():
        raise ValueError(f"{parsed.num_blocks} blocks in the files {sorted(parsed.files)}")
    return parsed


def _parse_stack(content: Mapping[str, Any]) -> StackManifest:
    parsed = StackManifest(
        family=_is(str, content["family"]),
        digest=_is(str, content["digest"]),
        stem=_is(bool, content["stem"]),
        head=_is(bool, content["head"]),
        order=tuple(_is(int, number) for number in content["order"]),
        files=_records(content),
    )
    if not parsed.order or min(parsed.order) < 0 or max(len(parsed.order), *parsed.order) > _MAX_BLOCKS:
        raise ValueError(f"the order {parsed.order}")
    needed = {layer_file(number) for number in parsed.order}
    needed |= ({STEM} if parsed.stem else set()) | ({HEAD} if parsed.head else set())
    if needed != parsed.files.keys():
        raise ValueError(f"a stack in the files {sorted(parsed.files)}")
    return parsed


def _records(content: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {
        _is(str, name): FileRecord(_is(int, record["bytes"]), _is(str, record["sha256"]))
        for name, record in content["files"].items()
    }


def _parse(content: Mapping[str, Any]) -> Manifest:
    """Raises one of many errors unless every field is of its type and the fields agree."""
    parsed = Manifest(
        family=_is(str, content["family"]),
        digest=_is(str, content["digest"]),
        seed=_is(int, content["seed"]),
        single_file=_is(bool, content["single_file"]),
        image_shape=tuple(_positive(size) for size in content["image_shape"]),  # type: ignore[arg-type]
        class_names=tuple(_is(str, name) for name in content["class_names"]),
        width=_positive(content["width"]),
        schedule=_schedule(content),
        files=_records(content),
        storage=_storage(content),
        whole=_is(bool, content.get("whole", False)),
    )
    num_blocks = parsed.schedule.num_blocks
    needed = {MODEL} if parsed.single_file else {WEIGHTS, *(block_file(i) for i in range(min(num_blocks, _MAX_BLOCKS)))}
    if num_blocks > _MAX_BLOCKS or needed != parsed.files.keys():
        raise ValueError(f"{num_blocks} blocks in the files {sorted(parsed.files)}")
    if len(parsed.image_shape) != 3 or not parsed.class_names or not 0 <= parsed.seed < 2**63:
        raise ValueError(f"images {parsed.image_shape}, {parsed.num_classes} classes, seed {parsed.seed}")
    return parsed


def _storage(content: Mapping[str, Any]) -> Storage:
    found: Storage = content.get("storage", "fp32")
    if found not in STORAGES:
        raise ValueError(f"the storage {found!r}")
    return found


def _schedule(content: Mapping[str, Any]) -> NoiseSchedule:
    told = content["schedule"]
    found = NoiseSchedule(
        _positive(told["num_blocks"]),
        *(_is(float, told[key]) for key in ("sigma_min", "sigma_max", "p_mean", "p_std", "overlap")),
    )
    if not found.quantile(found.sigma_min) < found.quantile(found.sigma_max):
        raise ValueError(f"the noise levels {found} are no distribution")
    return found


def _is(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _positive(value: Any) -> int:
    if _is(int, value) < 1:
        raise ValueError(f"{value} is not positive")
    return int(value)
