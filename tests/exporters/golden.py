"""The golden files in tests/golden, in the layout of ONNX's own test data: NAME/model.onnx, its weights inside, and
NAME/test_data_set_0 with its inputs and outputs. The outputs are torch's.

``python -m tests.exporters.golden`` writes them anew.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

import devices
from edgetrain.inference import LanguageModel, SessionWeights
from edgetrain.models.attention import KeyValue
from edgetrain.session import Session
from exporters import parity
from exporters.manifest import MODEL, block_file
from exporters.reference import Model
from tests.exporters import test_images, test_text
from tests.exporters.common import export, make_session, small_spec
from tests.test_importing import imported, save_model
from tests.text_families import small

GOLDEN = Path(__file__).parents[1] / "golden"
VERSION = "golden"

Arrays = dict[str, NDArray[Any]]
_TINY = {"model.width": 8, "model.depth": 2}
_TINY_TEXT = {"model__width": 8, "model__depth": 2}


def _vit(path: Path, single_file: bool, **changes: Any) -> tuple[Session, Arrays, Arrays]:
    session = make_session(path, small_spec(_TINY | {key.replace("__", "."): value for key, value in changes.items()}))
    _, _, inputs = next(parity.cases(session.spec, single_file))
    given = {name: [array] for name, array in inputs.items()}
    model = Model(session)
    if parity.is_whole_classifier(session.spec):
        (found,) = model.classes(**given)
    else:
        (found,) = model.chain(**given) if single_file else model.block(0, **given)
    return session, inputs, dict(zip(parity.outputs(session.spec, single_file), found, strict=True))


def _dit(path: Path, single_file: bool) -> tuple[Session, Arrays, Arrays]:
    session = make_session(path, test_images.spec_of(_TINY))
    _, _, inputs = next(parity.cases(session.spec, single_file))
    given, model = {name: [array] for name, array in inputs.items()}, Model(session)
    (found,) = model.generated(**given) if single_file else model.images(0, **given)
    return session, inputs, {"images" if single_file else "denoised": found[0]}


def _text(family: str, **changes: Any) -> Callable[[Path, bool], tuple[Session, Arrays, Arrays]]:
    def made(path: Path, single_file: bool) -> tuple[Session, Arrays, Arrays]:
        session = make_session(path, small(family, **_TINY_TEXT, **changes))
        block, _, inputs = next(parity.text_cases(session.spec, single_file))
        computed = test_text.model_of(session).outputs(block, inputs)
        if "state" in inputs:
            inputs["loops"] = np.array(session.spec.text_model.loops)
        return session, inputs | _cache(inputs["input_ids"], 2, 2, 4), computed

    return made


def _language(name: str) -> Callable[[Path, bool], tuple[Session, Arrays, Arrays]]:
    def made(path: Path, single_file: bool) -> tuple[Session, Arrays, Arrays]:
        session = imported(save_model(path / "base", name, "F32"), path / "s")
        model = session.spec.language
        tokens = next(parity.language_cases(session.spec))
        weights = LanguageModel(SessionWeights(session), devices.open_device("cpu"))
        n, length = tokens.shape
        caches = [KeyValue(n, model.kv_heads, length, model.head_dim) for _ in range(model.depth)]
        outputs = {"logits": weights.logits(tokens, caches)}
        for number, cache in enumerate(caches):
            outputs |= {f"present.{number}.key": cache.keys.numpy(), f"present.{number}.value": cache.values.numpy()}
        past = _cache(tokens, model.depth, model.kv_heads, model.head_dim)
        return session, {"input_ids": tokens, **past}, outputs

    return made


def _cache(tokens: NDArray[np.int64], depth: int, heads: int, head_dim: int) -> Arrays:
    """The inputs of a text that begins."""
    n, length = tokens.shape
    past = {
        f"past_key_values.{i}.{kind}": np.empty((n, heads, 0, head_dim), np.float32)
        for i in range(depth)
        for kind in ("key", "value")
    }
    positions = np.broadcast_to(np.arange(length), (n, length)).copy()
    return {"attention_mask": np.ones((n, length), np.int64), "position_ids": positions, **past}


EXACT = {"train__objective": "exact"}
CASES: dict[str, tuple[Callable[..., tuple[Session, Arrays, Arrays]], bool]] = {
    "vit_block": (_vit, False),
    "vit_chain": (_vit, True),
    "vit_whole": (lambda path, single_file: _vit(path, single_file, **EXACT), False),
    "dit_block": (_dit, False),
    "dit_all_steps": (_dit, True),
    "masked_block": (_text("masked", model__neighbours=1), False),
    "masked_all_blocks": (_text("masked"), True),
    "ar_block": (_text("ar"), False),
    "ar_sigma_max": (_text("ar"), True),
    "ar_whole": (_text("ar", **EXACT), True),
    "recurrent_block": (_text("recurrent"), False),
    "recurrent_whole": (_text("recurrent", **EXACT, model__loops=3), False),
    **{name.replace(" ", "_"): (_language(name), True) for name in ("llama tied", "gpt2", "qwen3")},
}


def make(name: str, folder: Path) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    """A case as the emitter makes it now: the model with its weights, and its inputs and outputs in their order."""
    builder, single_file = CASES[name]
    session, inputs, outputs = builder(folder / "session", single_file)
    to = export(session, folder / "x", single_file)
    model = onnx.load(to / (MODEL if single_file else block_file(0)))
    model.producer_version = VERSION
    del model.metadata_props[:]
    given = {one.name: inputs[one.name] for one in model.graph.input}
    if "t" in given and single_file:
        given["t"] = given["t"][:1]
    return model, given, {one.name: outputs[one.name] for one in model.graph.output}


def stored(name: str) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    """As ``make``, of the golden files."""
    model, data = onnx.load(GOLDEN / name / MODEL), GOLDEN / name / "test_data_set_0"
    ends = []
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        tensors = [onnx.load_tensor(data / f"{kind}_{i}.pb") for i in range(len(values))]
        ends.append({tensor.name: numpy_helper.to_array(tensor) for tensor in tensors})
    return model, ends[0], ends[1]


def write() -> Iterator[str]:
    """Writes all cases; the name of each when it is done."""
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model, inputs, outputs = make(name, Path(folder))
        to = GOLDEN / name
        shutil.rmtree(to, ignore_errors=True)
        (to / "test_data_set_0").mkdir(parents=True)
        onnx.save(model, to / MODEL)
        for kind, arrays in (("input", inputs), ("output", outputs)):
            for number, (tensor, array) in enumerate(arrays.items()):
                file = to / "test_data_set_0" / f"{kind}_{number}.pb"
                file.write_bytes(numpy_helper.from_array(array, tensor).SerializeToString())
        yield name


if __name__ == "__main__":
    for made in write():
        print(made, flush=True)
