"""What onnxruntime's training API takes to a device: of each block a graph that trains, one that evaluates, an
optimizer, and a checkpoint. Made by onnxruntime-training's own generator from the emitted loss. No torch here."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgetrain import __version__
from edgetrain.noise import masking_band
from edgetrain.session import Session
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.stages import stages_of_block
from exporters import ort_training
from exporters.graph import IR_VERSION, Stored
from exporters.manifest import CODEBOOK, FileRecord, TrainingManifest, artifact_files
from exporters.runtime import import_onnxruntime
from exporters.weights import Weights

if TYPE_CHECKING:
    from onnx import ModelProto

_PACKAGE = "onnxruntime.training"
_CONVERTER = "onnxruntime.tools.convert_onnx_models_to_ort"


def emit(session: Session, folder: Path, digest: str) -> None:
    """Writes all blocks into ``folder``, and manifest.json.

    Raises:
        UsageError: onnxruntime cannot train this model, or not here.
    """
    from exporters.onnx import record

    spec = session.spec
    ort_training.check(spec)
    weights = Weights(session)
    files: dict[str, FileRecord] = {}
    for block in range(spec.num_blocks):
        _generate(session, weights, block, folder)
        files |= {name: record(folder / name) for name in artifact_files(block)}
    TrainingManifest(
        family=spec.model.family,
        digest=digest,
        num_blocks=spec.num_blocks,
        batch_size=spec.train.batch_size,
        files=files,
        draws=_draws(spec),
    ).write(folder)


def _draws(spec: Spec) -> dict[str, Any]:
    """What the examples of a block are made of: sizes, and from where to where its noise levels are."""
    noise, blocks = spec.diffusion_blocks.noise, range(spec.num_blocks)
    found: dict[str, Any] = {}
    if isinstance(spec.model, TextModelSpec):
        found |= {"vocab_size": spec.model.vocab_size, "length": spec.text.length}
    else:
        found |= {"image_shape": spec.image_model.image_shape, "num_classes": spec.image_model.num_classes}
    if spec.model.family == "masked":
        return found | {"mask": found["vocab_size"], "t": [masking_band(spec.num_blocks, block) for block in blocks]}
    found |= {"sigma": [noise.training_band(block) for block in blocks], "p_mean": noise.p_mean, "p_std": noise.p_std}
    return found | ({"codebook": CODEBOOK} if spec.codebook_rows else {"sigma_data": spec.sigma_data})


def _generate(session: Session, weights: Weights, block: int, folder: Path) -> None:
    spec = session.spec
    trained = tuple(f"{stage.name}." for stage in stages_of_block(spec, block) if stage.trained)
    graph = ort_training.loss_graph(spec, block, weights.shapes)
    names = [one.name for one in graph.weights()]
    model = graph.model({"digest": session.store.digest()}, __version__, {})
    _hold(model, weights, names)
    with _generator() as (artifacts, onnxblock):
        made = spec.optimizer
        optimizer = onnxblock.optim.AdamW(betas=(made.beta1, made.beta2), eps=made.eps, weight_decay=made.weight_decay)
        artifacts.generate_artifacts(
            model,
            requires_grad=[name for name in names if name.startswith(trained)],
            frozen_params=[name for name in names if not name.startswith(trained)],
            optimizer=optimizer,
            artifact_directory=folder,
            prefix=f"block{block:02d}.",
        )
    _as_torch(folder / artifact_files(block)[2])


def _hold(model: ModelProto, weights: Weights, names: list[str]) -> None:
    """Makes weights, which are inputs, initializers with their values."""
    from onnx import helper

    inputs = [one for one in model.graph.input if one.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name in names:
        shape = weights.shapes[name]
        data = b"".join(bytes(chunk) for chunk in weights.chunks(Stored(name, shape)))
        model.graph.initializer.append(helper.make_tensor(name, 1, shape, data, raw=True))


def _as_torch(path: Path) -> None:
    """AdamW as torch has it: epsilon is added to the corrected root, and decay comes first."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "AdamWOptimizer":
            others = [one for one in node.attribute if one.name != "adam_mode"]
            del node.attribute[:]
            node.attribute.extend([*others, onnx.helper.make_attribute("adam_mode", 0)])
    onnx.save(model, path)


class Trained:
    """A block's artifacts as the training API loads them: graphs that train and evaluate, optimizer and checkpoint."""

    def __init__(self, folder: Path, block: int) -> None:
        training, evaluating, optimizer, checkpoint = (str(folder / name) for name in artifact_files(block))
        with _silence():
            api = _import_training("api")
            self._state = api.CheckpointState.load_checkpoint(checkpoint)
            self._module = api.Module(training, self._state, evaluating)
            self._optimizer = api.Optimizer(optimizer, self._module)
            self._module.eval()

    def loss(self, given: Mapping[str, NDArray[Any]]) -> float:
        """Of some examples, by the weights of the checkpoint."""
        return float(self._module(*(given[name] for name in self._module.input_names())))


def _import_training(name: str) -> Any:
    """A module of onnxruntime.training, without the package around and the converter beside it, which import torch."""
    ort = import_onnxruntime()
    if _PACKAGE not in sys.modules:
        package, converter = types.ModuleType(_PACKAGE), types.ModuleType(_CONVERTER)
        package.__path__ = [str(Path(ort.__file__).parent / "training")]
        converter.__dict__.update(OptimizationStyle=None, convert_onnx_models_to_ort=None)
        stand_ins: dict[str, Any] = {_PACKAGE: package, f"{_PACKAGE}.ortmodule": None, _CONVERTER: converter}
        sys.modules.update(stand_ins)
    return importlib.import_module(f"{_PACKAGE}.{name}")


@contextlib.contextmanager
def _generator() -> Iterator[tuple[Any, Any]]:
    """The modules artifacts and onnxblock; onnx makes models of the version that onnxruntime-training knows. What is
    said on the way is not."""
    import onnx

    before: Any = onnx.IR_VERSION
    changed: Any = IR_VERSION
    onnx.IR_VERSION = changed
    try:
        with _silence():
            yield _import_training("artifacts"), _import_training("onnxblock")
    finally:
        onnx.IR_VERSION = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """onnxruntime's graph builder writes each of its thoughts to stderr, whatever severity is set."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
