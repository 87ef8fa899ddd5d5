"""The golden files: the emitter still makes them, and every onnxruntime there is computes what they say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.exporters.golden import CASES, GOLDEN, make, stored

_MOST_BYTES = 300_000


@pytest.mark.parametrize("name", CASES)
def test_the_emitter_makes_what_is_stored(name: str, tmp_path: Path) -> None:
    """``python -m tests.exporters.golden`` writes them anew where a change is meant."""
    model, inputs, outputs = make(name, tmp_path)
    expected, given, computed = stored(name)
    assert model.graph == expected.graph
    assert list(inputs) == list(given) and list(outputs) == list(computed)
    for array, before in zip((*inputs.values(), *outputs.values()), (*given.values(), *computed.values()), strict=True):
        atol = 1e-5 * max(1.0, np.abs(before).max(initial=0))
        np.testing.assert_allclose(array, before, rtol=1e-4, atol=atol)


def test_each_is_small_and_none_is_left_over() -> None:
    assert {path.parent.name for path in GOLDEN.glob("*/model.onnx")} == set(CASES)
    for name in CASES:
        assert sum(path.stat().st_size for path in (GOLDEN / name).rglob("*.*")) < _MOST_BYTES


def test_this_onnxruntime_computes_what_they_say() -> None:
    done = subprocess.run([sys.executable, GOLDEN / "check.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES)} models, 0 failed" in done.stdout


def test_a_difference_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    wrong = tmp_path / "golden" / "vit_block" / "test_data_set_0" / "output_0.pb"
    wrong.write_bytes(wrong.read_bytes()[:-4] + np.float32(9).tobytes())
    command = [sys.executable, tmp_path / "golden" / "check.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 failed" in done.stdout


@pytest.mark.slow
def test_the_newest_onnxruntime_computes_what_they_say(tmp_path: Path) -> None:
    """In an environment of its own: it owns the folder of the training build."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "onnx", "onnxruntime"], check=True)
    done = subprocess.run([python, GOLDEN / "check.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "onnxruntime 1.19.2" not in done.stdout
    assert f"{len(CASES)} models, 0 failed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no node")
def test_the_web_computes_what_they_say(tmp_path: Path) -> None:
    """onnxruntime-web under node."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    subprocess.run(["npm", "install", "--silent", "onnxruntime-web"], cwd=tmp_path / "golden", check=True)
    command = ["node", "check.mjs"]
    done = subprocess.run(command, cwd=tmp_path / "golden", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES)} models, 0 failed" in done.stdout
