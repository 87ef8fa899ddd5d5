"""A stack of somebody's own as ONNX: torch.onnx.export of one part at a time, its weights inside. Needs torch, and the
file that makes the stack."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from devices.limits import is_out_of_memory
from edgetrain.errors import BadInput
from edgetrain.models.base import Boundary
from edgetrain.models.stack import StackNetwork, called
from edgetrain.session import Session
from edgetrain.stages import Unit, exact_stages
from exporters.graph import OPSET, Stored
from exporters.manifest import HEAD, STEM, layer_file
from exporters.parity import BATCH_SIZES
from exporters.weights import Weights

_NO_MEMORY = "Could not allocate"  # of torch's binding to Python
_Tensors = Sequence[Mapping[str, Tensor]]


def emit(session: Session, folder: Path, outputs: io.BytesIO) -> None:
    """Writes stem.onnx, layerNNN.onnx of each block and head.onnx, those that there are, into ``folder``; and, of
    batches of two sizes, the input and what torch makes of it into ``outputs``.

    Raises:
        BadInput: a part has no ONNX, or the head makes no tensor.
    """
    network, stages = StackNetwork(session.spec, None), exact_stages(session.spec)
    weights = Weights(session)
    batches = [_examples(network, count) for count in BATCH_SIZES]
    with torch.no_grad():
        stem = _module(network, weights, stages.stem, "stem")
        boundaries = [network.enter(stem, batch) for batch in batches]
        names = sorted(boundaries[0].context)
        if network.stack.stem is not None:
            given = [{"input": batch["input"]} for batch in batches]
            made = [{"next": one.carried["hidden"], **one.context} for one in boundaries]
            _export("the stem", stem, folder / STEM, given, made)
        del stem
        done = set()
        for unit in stages.layers:
            kind = unit.kind
            layer = _module(network, weights, unit, kind)
            following = [network.layer(layer, one) for one in boundaries]
            if kind not in done:
                given = [_inputs(one, names) for one in boundaries]
                made = [{"next": one.carried["hidden"]} for one in following]
                _export(called(kind), layer, folder / layer_file(int(kind.removeprefix("layer"))), given, made)
                done.add(kind)
            boundaries = following
            del layer
        head = _module(network, weights, stages.head, "head")
        results = [network._call("head", head, one.carried["hidden"]) for one in boundaries]
        if not all(isinstance(one, Tensor) for one in results):
            raise BadInput(f"the head makes a {type(results[0]).__name__}, and an export needs a tensor")
        if network.stack.head is not None:
            given = [{"hidden": one.carried["hidden"]} for one in boundaries]
            _export("the head", head, folder / HEAD, given, [{"output": one} for one in results])
    for batch, result in zip(batches, results, strict=True):
        np.save(outputs, batch["input"].numpy())
        np.save(outputs, result.numpy())


def _examples(network: StackNetwork, count: int) -> dict[str, Tensor]:
    """Of the stack's data, each of a step of its own."""
    drawn = [network.draw(step, 0, 1) for step in range(count)]
    return {name: torch.from_numpy(np.concatenate([one[name] for one in drawn])) for name in ("input", "target")} | {
        "drawn": torch.from_numpy(np.asarray(drawn[0]["drawn"]))
    }


def _inputs(boundary: Boundary, names: Sequence[str]) -> dict[str, Tensor]:
    return {"hidden": boundary.carried["hidden"], **{name: boundary.context[name] for name in names}}


def _module(network: StackNetwork, weights: Weights, unit: Unit, kind: str) -> nn.Module:
    """A part with its trained weights, as it is when nothing is drawn at random."""
    module = network.build(kind)
    found: dict[str, Tensor] = {}
    for stage in unit.stages:
        prefix = f"{stage.name}."
        for name, shape in weights.shapes.items():
            if name.startswith(prefix):
                data = b"".join(bytes(chunk) for chunk in weights.chunks(Stored(name, shape)))
                values = np.frombuffer(bytearray(data), np.float32).reshape(shape)
                found[name.removeprefix(prefix)] = torch.from_numpy(values)
    module.load_state_dict(found, strict=False, assign=True)
    return module.eval()


def _export(
    what: str,
    module: nn.Module,
    path: Path,
    given: Sequence[Mapping[str, Tensor]],
    made: Sequence[Mapping[str, Tensor]],
) -> None:
    """What differs between batches of two sizes may vary."""
    first, *named = given[0].items()
    dims = {
        name: {axis: "n" for axis, sizes in enumerate(zip(a.shape, b[name].shape, strict=True)) if sizes[0] != sizes[1]}
        for a_all, b in ((given[0], given[1]), (made[0], made[1]))
        for name, a in a_all.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (first[1],), str(path), kwargs=dict(named) or None, input_names=list(given[0]),
                output_names=list(made[0]), dynamic_axes={n: d for n, d in dims.items() if d}, opset_version=OPSET,
                dynamo=False,
            )  # fmt: skip
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or _NO_MEMORY in str(error):
            raise MemoryError(str(error)) from error
        raise BadInput(f"{what} has no ONNX: {type(error).__name__}: {error}") from error
