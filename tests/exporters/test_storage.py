"""Matrices stored coarsely: what the file holds, and what onnxruntime makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from exporters import weights as streaming
from exporters.graph import Graph, Storage, Stored
from exporters.manifest import WEIGHTS, Manifest
from exporters.onnx import stage
from exporters.runtime import open_model
from exporters.weights import Weights, write_safetensors
from tests.exporters.common import export, make_session, small_spec
from tests.test_dit import run
from tests.test_importing import cut_small, imported, save_model


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(make_session(tmp_path / "s", small_spec()))


def whole(weights: Weights, name: str) -> np.ndarray:
    found = weights[name]
    data = b"".join(bytes(chunk) for chunk in weights.chunks(Stored(name, found.shape)))
    return np.frombuffer(data, np.float32).reshape(found.shape)


@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize("tile_bytes", [1, 40, 8 << 20])
def test_levels_times_scales_are_the_matrix(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, channels: int, tile_bytes: int
) -> None:
    """To half a level of its channel, whatever is in memory at a time."""
    monkeypatch.setattr(streaming, "_TILE_BYTES", tile_bytes)
    weights._buffer = memoryview(bytearray(104))  # rows are cut
    name = next(name for name in weights.shapes if name.endswith("qkv.weight"))
    matrix = whole(weights, name)
    by_channel = matrix if channels == 0 else matrix.T  # (out, in)
    num_out, num_in = by_channel.shape
    levels = Stored(f"{name}.int8", (num_in, num_out), "U8", "int8", name, channels)
    scale = Stored(f"{name}.scale", (num_out,), "F32", "scale", name, channels)
    read = {
        one.form: b"".join(bytes(chunk) for chunk in weights.chunks(one)) for one in (levels, scale)
    }  # fmt: skip
    scales = np.frombuffer(read["scale"], np.float32)
    signed = np.frombuffer(read["int8"], np.uint8).reshape(num_in, num_out).astype(np.int64) - 128
    assert np.abs(signed).max(0).tolist() == [127] * num_out
    np.testing.assert_allclose(scales, np.abs(by_channel).max(1) / 127, rtol=1e-6)
    assert (np.abs(signed.T * scales[:, None] - by_channel) <= 0.5001 * scales[:, None]).all()


def test_a_channel_of_zeros_has_a_scale(tmp_path: Path) -> None:
    session = make_session(tmp_path / "s", small_spec())
    weights = Weights(session)
    name = next(name for name in weights.shapes if name.endswith("qkv.weight"))
    zeros = type("Zeros", (), {"read": staticmethod(lambda stage, role, into, offset=0: into.__setitem__(
        slice(None), bytes(len(into))))})  # fmt: skip
    weights._store = zeros  # type: ignore[assignment]
    out = weights.shapes[name][0]
    data = b"".join(bytes(c) for c in weights.chunks(Stored("s", (out,), "F32", "scale", name)))
    assert set(np.frombuffer(data, np.float32)) == {1.0}
    levels = Stored("l", weights.shapes[name][::-1], "U8", "int8", name)
    assert set(b"".join(bytes(c) for c in weights.chunks(levels))) == {128}


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("channels", [0, 1])
def test_a_product_is_that_of_the_matrix(weights: Weights, tmp_path: Path, storage: Storage, channels: int) -> None:
    name = next(name for name in weights.shapes if name.endswith("qkv.weight"))
    matrix = whole(weights, name)
    matrix = matrix.T if channels == 0 else matrix  # (in, out)
    graph = Graph("product", weights.shapes, storage)
    graph.output(
        "y", graph.gemm(graph.input("x", matrix.shape[0]), name, channels=channels, coarse=True), matrix.shape[1]
    )
    _, places = write_safetensors(tmp_path / WEIGHTS, weights, graph.weights())
    (tmp_path / "m.onnx").write_bytes(graph.model({}, "", places).SerializeToString())
    x = np.random.default_rng(0).standard_normal((5, matrix.shape[0]), np.float32)
    (y,) = open_model(tmp_path / "m.onnx", 1).run(None, {"x": x})
    error = np.abs(y - x @ matrix).max() / np.abs(x @ matrix).max()
    assert error < {"fp32": 1e-6, "fp16": 2e-3, "int8": 0.02}[storage]
    assert error > {"fp32": -1, "fp16": 1e-6, "int8": 1e-4}[storage], "it was not stored so"


@pytest.mark.parametrize("single_file", [False, True])
def test_only_layers_are_coarse(tmp_path: Path, single_file: bool) -> None:
    folder = export(make_session(tmp_path / "s", small_spec()), tmp_path / "x", single_file, "int8")
    if not single_file:
        with safe_open(folder / WEIGHTS, "np") as file:
            coarse = {name for name in file.keys() if file.get_slice(name).get_dtype() == "U8"}  # noqa: SIM118
        coarse = {name for name in coarse if not name.startswith("pad.")}
        assert {name.split(".")[-3] for name in coarse} == {"qkv", "out", "up", "down", "modulation"}


@pytest.mark.parametrize("storage", ["fp16", "int8"])
@pytest.mark.parametrize("single_file", [False, True])
@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_language_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, storage: Storage, single_file: bool
) -> None:
    """A tied table is there once, and both of its uses have the same type."""
    from exporters.language_runtime import LanguageRunner

    cut_small(monkeypatch)
    session = imported(save_model(tmp_path / "base", name, "F32"), tmp_path / "s")
    tokens = np.random.default_rng(1).integers(0, session.spec.language.vocab_size, (2, 15))
    logits = []
    for kind in ("fp32", storage):
        with stage(session, tmp_path / kind, single_file, kind) as staged:  # type: ignore[arg-type]
            staged.publish()
        runner = LanguageRunner(tmp_path / kind)
        logits.append(runner.run(tokens, runner.empty(2))[0])
    largest = np.abs(logits[0]).max()
    assert 0 < np.abs(logits[1] - logits[0]).max() < {"fp16": 0.02, "int8": 0.2}[storage] * largest


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_the_command(tmp_path: Path, storage: str) -> None:
    """It is compared within its tolerance, and predicts with it."""
    session = make_session(tmp_path / "s", small_spec({"model.image_shape": [1, 8, 8]})).path
    to = tmp_path / "x"
    made = run("export", session, "--to", to, f"--{storage}", "--memory-budget", "400MiB")
    assert made["storage"] == storage
    assert all(row["passed"] and row["rtol"] == 0 < row["max_abs"] <= row["atol"] for row in made["parity"])
    assert Manifest.read(to).storage == storage
    found = run("predict", to, "--data", "digits", "--threads", 1, "--memory-budget", "200MiB")
    assert found["results"] and found["peak_bytes"] <= 200 << 20
    assert "predicting" in run("predict", to, "--data", "digits", "--memory-budget", "60MiB", exit_code=8)["message"]
    said = run("export", session, "--to", to, "--int8", "--fp16", exit_code=2)
    assert "in one way" in said["message"]
