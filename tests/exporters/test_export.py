"""The graphs compute what torch computes, in every variant; the files are what they say they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession
from safetensors import safe_open

from edgetrain.errors import SessionCorrupt, SessionLocked, UsageError
from edgetrain.session import Session
from exporters import weights
from exporters.graph import Graph, Stored
from exporters.manifest import Manifest, block_file
from exporters.onnx import stage
from exporters.reference import Model
from exporters.runtime import Predictor, open_model
from exporters.vit import UNROLLED
from tests.exporters.common import VARIANTS, export, make_session, random_weights, run_python, shapes_of, small_spec

RTOL, ATOL = 1e-4, 1e-5


def inputs(session: Session, count: int) -> dict[str, np.ndarray]:
    """sigma from one end of all blocks' range to the other."""
    spec, generator = session.spec, np.random.default_rng(count)
    method = spec.diffusion_blocks
    unit = generator.standard_normal((count, spec.model.width), np.float32)
    sigma = np.geomspace(method.sigma_min, method.sigma_max, count).astype(np.float32)
    images = generator.uniform(-1, 1, (count, *spec.model.image_shape)).astype(np.float32)
    return {"images": images, "z": unit * np.sqrt(1 + sigma[:, None] ** 2), "sigma": sigma}


@pytest.fixture(scope="module", params=VARIANTS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("session") / "s", small_spec(VARIANTS[request.param]))


def test_blocks_compute_what_torch_computes(session: Session, tmp_path: Path) -> None:
    folder = export(session, tmp_path / "e")
    batches = [inputs(session, count) for count in (1, 2, 5, 7)]
    for block in range(session.spec.num_blocks):
        model = open_model(folder / block_file(block), 1)
        assert [output.name for output in model.get_outputs()] == ["logits", "denoised"]
        expected = Model(session).block(block, *([batch[name] for batch in batches] for name in batches[0]))
        for batch, outputs in zip(batches, expected, strict=True):
            for got, wanted in zip(model.run(None, batch), outputs, strict=True):
                np.testing.assert_allclose(got, wanted, RTOL, ATOL)
                assert wanted.std() > 0.01


def test_every_input_and_every_weight_matters(session: Session, tmp_path: Path) -> None:
    """Were an input or a weight ignored by both sides, they would agree all the same."""
    folder = export(session, tmp_path / "e")
    model = open_model(folder / block_file(0), 1)
    batch = inputs(session, 5)
    logits = model.run(["logits"], batch)[0]
    for name in batch:
        changed = model.run(["logits"], batch | {name: np.roll(batch[name], 1, axis=0)})[0]
        assert np.abs(changed - logits).max() > 1e-3, name
    with safe_open(folder / "weights.safetensors", "np") as file:
        held = {name for name in file.keys() if not name.startswith("pad.")}  # noqa: SIM118
    assert held == {name for name in weights.Weights(session).shapes if ".auxiliary." not in name}


def test_single_file_is_the_chain(session: Session, tmp_path: Path) -> None:
    """It computes what torch does and what the host loop over the blocks does."""
    blocks, single = export(session, tmp_path / "blocks"), export(session, tmp_path / "single", single_file=True)
    model, generator = open_model(single / "model.onnx", 1), np.random.default_rng(0)
    assert [output.name for output in model.get_outputs()] == ["logits", "sigma_max_logits"]
    images = [inputs(session, count)["images"] for count in (1, 2, 5, 7)]
    noise = [generator.standard_normal((len(one), session.spec.model.width), np.float32) for one in images]
    for i, expected in enumerate(Model(session).chain(images, noise)):
        for got, wanted in zip(model.run(None, {"images": images[i], "noise": noise[i]}), expected, strict=True):
            np.testing.assert_allclose(got, wanted, RTOL, ATOL)
    for draws in (0, 2):
        one, other = (Predictor(folder).predict(images[3], 40, draws=draws) for folder in (blocks, single))
        np.testing.assert_allclose(one.probabilities, other.probabilities, 1e-5, 2e-6)
        np.testing.assert_allclose(one.sigma_max_probabilities, other.sigma_max_probabilities, 1e-5, 2e-6)


def test_many_ways_are_chosen_among_by_halves() -> None:
    """A file may not be nested much deeper than some thirty Ifs in each other."""
    graph = Graph("choice", {})
    number = graph.tensor("number", "int64")

    def way(own: int) -> str:
        return graph.op("Identity", graph.floats([float(own)]))

    def is_before(own: int) -> str:
        return graph.op("Less", number, graph.number(own))

    graph.result("out", graph.choose_owner(0, 100, is_before, way, 1), 1)
    model = graph.model({}, "", {})

    def depth(nodes: Any) -> int:
        return max((1 + depth(one.g.node) for node in nodes for one in node.attribute if one.HasField("g")), default=0)

    assert depth(model.graph.node) == 7
    session = InferenceSession(model.SerializeToString())
    for own in (0, 1, 49, 50, 98, 99):
        assert session.run(None, {"number": np.array(own)})[0] == own


def test_a_long_chain_is_a_loop(tmp_path: Path) -> None:
    """Beyond eight steps a Loop runs those between the first and the last, and an If in it the block that owns one."""
    depth = UNROLLED + 3
    session = make_session(tmp_path / "s", small_spec({"model.depth": depth, "diffusion_blocks.num_blocks": depth}))
    folder = export(session, tmp_path / "e", single_file=True)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    assert [node.op_type for node in onnx.load(folder / "model.onnx").graph.node].count("Loop") == 1
    model, generator = open_model(folder / "model.onnx", 1), np.random.default_rng(0)
    images = [inputs(session, count)["images"] for count in (1, 5)]
    noise = [generator.standard_normal((len(one), session.spec.model.width), np.float32) for one in images]
    for i, expected in enumerate(Model(session).chain(images, noise)):
        for got, wanted in zip(model.run(None, {"images": images[i], "noise": noise[i]}), expected, strict=True):
            np.testing.assert_allclose(got, wanted, RTOL, ATOL)


def test_models_are_valid_and_described(session: Session, tmp_path: Path) -> None:
    for single_file in (False, True):
        folder = export(session, tmp_path / str(single_file), single_file=single_file)
        manifest = Manifest.read(folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted([*manifest.files, "manifest.json"])
        for path in folder.glob("*.onnx"):
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(path)
            assert (model.ir_version, model.opset_import[0].version) == (10, 20)
            assert model.producer_name == "edgetrain"
            properties = {prop.key: prop.value for prop in model.metadata_props}
            assert properties["digest"] == manifest.digest == session.store.digest()
            assert properties.keys() >= {"family", "preprocessing", "sigma_low", "sigma_high", "producer"}
            tensors = [*model.graph.input, *model.graph.output]
            assert all(tensor.type.tensor_type.shape.dim[0].dim_param == "n" for tensor in tensors)
            assert {node.op_type for node in model.graph.node}.isdisjoint({"RandomNormalLike", "Loop", "If"})


def test_weights_are_the_sessions(session: Session, tmp_path: Path) -> None:
    """As safetensors, at multiples of a page; and in a single file, as onnx reads it."""
    folder = export(session, tmp_path / "e")
    found = weights.Weights(session)
    single = onnx.load(export(session, tmp_path / "single", single_file=True) / "model.onnx")
    inside = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in single.graph.initializer}
    with safe_open(folder / "weights.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.startswith("pad."):
                stored = Stored(name, found[name].shape)
                expected = np.frombuffer(b"".join(bytes(c) for c in found.chunks(stored)), np.float32)
                expected = expected.reshape(found[name].shape)
                np.testing.assert_array_equal(file.get_tensor(name), expected)
                if name != "codebook.rows" or session.spec.num_blocks > 1:  # a chain of one step doesn't need it
                    np.testing.assert_array_equal(inside[name], expected)
    for tensor in onnx.load(folder / "block00.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert not place or int(place["offset"]) % 4096 == 0


@pytest.fixture
def small(tmp_path: Path) -> Session:
    return make_session(tmp_path / "s", small_spec())


def test_manifest_is_enough_for_a_host_loop(small: Session, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads((export(small, tmp_path / "e") / "manifest.json").read_text())
    assert (content["format"], content["version"], content["family"]) == ("edgetrain.export", 1, "vit")
    assert [step["block"] for step in content["chain"]] == [0, 1]
    assert [step["sigma"] for step in content["chain"]] == [20.0, 0.05]
    assert content["noise"]["seed"] == content["seed"] == 3
    assert content["class_names"] == [str(digit) for digit in range(10)]
    assert content["preprocessing"] == "x/127.5-1"


def test_class_names_are_the_sessions(tmp_path: Path) -> None:
    """The data need not be there."""
    spec = small_spec({"data.source": str(tmp_path / "gone")})
    names = [f"class {i}" for i in range(10)]
    session = Session.create(tmp_path / "s", spec, shapes_of(spec), random_weights, names)
    assert Manifest.read(export(session, tmp_path / "e")).class_names == tuple(names)
    path = session.path / "session.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"class_names": names[1:]}))
    with pytest.raises(SessionCorrupt, match="class_names"):
        export(session, tmp_path / "e")
    del header["class_names"]  # as earlier versions made it
    path.write_text(json.dumps(header))
    assert Manifest.read(export(session, tmp_path / "e")).class_names == tuple(map(str, range(10)))


def test_only_an_earlier_export_is_replaced(small: Session, tmp_path: Path) -> None:
    to = tmp_path / "e"
    to.mkdir()
    export(small, to)
    (to / "parity.json").write_text("{}")
    export(small, to, single_file=True)
    assert sorted(path.name for path in to.iterdir()) == ["manifest.json", "model.onnx"]
    (to / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        export(small, to)
    assert (to / "notes.txt").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="is no export"):
        export(small, tmp_path / "other")
    with pytest.raises(UsageError, match="not a folder"):
        export(small, tmp_path / "other" / "file")


def test_what_is_not_published_is_deleted(small: Session, tmp_path: Path) -> None:
    """Folders that were made for it are as well; those that were there stay."""
    to = tmp_path / "there" / "out" / "e"
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError, match="on purpose"), stage(small, to, False) as staged:
        assert staged.folder.is_dir()
        with pytest.raises(SessionLocked), stage(small, to, False):
            pass
        assert staged.folder.is_dir()
        raise RuntimeError("on purpose")
    assert not any((tmp_path / "there").iterdir())
    left = to.with_name(f".{to.name}.partial")
    left.mkdir(parents=True)
    (left / "weights.safetensors").touch()
    export(small, to)
    assert [path.name for path in to.parent.iterdir()] == ["e"]


def test_a_single_file_has_a_largest_size(small: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_MODEL_BYTES", 50_000)
    with pytest.raises(UsageError, match=r"more than the 48\.8 KiB that ONNX allows"):
        export(small, tmp_path / "e", single_file=True)
    assert not (tmp_path / "e").exists()


EMIT = """
import sys
from pathlib import Path
from devices.meter import usage
from edgetrain.session import Session
from exporters.onnx import stage
with stage(Session.open(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "True") as staged:
    print(staged.publish().emit_peak_bytes, *{"torch", "onnxruntime"} & sys.modules.keys())
"""


def test_emission_needs_no_memory_for_weights(tmp_path: Path) -> None:
    """A model of 100 MB takes hardly more than one of 100 KB, and no torch."""
    specs = [small_spec({"model.width": width, "model.depth": 7}) for width in (16, 512)]
    sessions = [make_session(tmp_path / f"s{spec.model.width}", spec) for spec in specs]
    for single_file in (False, True):
        sizes, peaks = [], []
        for session in sessions:
            to = session.path.with_name(f"{session.path.name}.{single_file}")
            peak, *imported = run_python(EMIT, str(session.path), str(to), str(single_file)).split()
            assert not imported
            sizes.append(sum(path.stat().st_size for path in to.iterdir()))
            peaks.append(int(peak))
        assert sizes[1] > 100e6 > 100 * sizes[0]
        assert peaks[1] - peaks[0] < 3 << 20
        assert peaks[1] < 60 << 20
