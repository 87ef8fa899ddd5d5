"""A stack of somebody's own as ONNX, by the command: what torch makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from edgetrain.errors import BadInput
from edgetrain.session import Session
from exporters.graph import Stored
from exporters.manifest import Manifest, StackManifest
from exporters.stack_runtime import StackRunner
from exporters.weights import Weights
from tests.test_importing import run_cli

_FILE = """
import torch
import torch.nn.functional as F
from torch import nn
import edgetrain

class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.gate = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.tokens(x)
        return hidden, {"gate": torch.sigmoid(self.gate(hidden.mean(1, keepdim=True))), "ramp": torch.linspace(0, 1, 5)}

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x, gate, ramp):
        return x + gate * self.drop(torch.tanh(self.linear(self.norm(x) * self.scale))) + ramp[:, None]

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(x.mean(1))

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.arange(i, i + 5) % 11, i % 3

def build():
    return edgetrain.Stack(
        stem=Stem, blocks=[Block, Block], order=[0, 1, 0], head=Head,
        loss=lambda output, target: F.cross_entropy(output, target), data=Data(),
    )

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.special.erfcx(self.linear(x))

def odd():
    data = [(torch.ones(4) * i, torch.ones(4)) for i in range(8)]
    return edgetrain.Stack(blocks=[Odd], loss=lambda output, target: F.mse_loss(output, target), data=data)
"""


def trained(folder: Path, function: str) -> Path:
    file, session = folder / "my.py", folder / function
    file.write_text(_FILE)
    more = ["--memory-budget", "400MiB", "--steps", 2, "--threads", 1, "--set", "train.batch_size=4"]
    done = run_cli("run", f"{file}:{function}", session, *more)
    assert done.returncode == 0, done.stderr
    return session


def test_all_parts_compute_what_torch_does(tmp_path: Path) -> None:
    """Context, constants, a block that runs twice; dropout drops nothing; any batch size."""
    session, to = trained(tmp_path, "build"), tmp_path / "x"
    done = run_cli("plan", session, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)["export_bytes"]
    assert 220 << 20 < needed < 320 << 20
    done = run_cli("export", session, "--to", to, "--memory-budget", needed, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["parity"]
    assert (row["output"], row["passed"], row["batch_sizes"]) == ("output", True, [2, 5])
    assert StackManifest.read(to).order == (0, 1, 0)
    assert {path.name for path in to.iterdir()} == {
        "stem.onnx", "layer000.onnx", "layer001.onnx", "head.onnx", "manifest.json", "parity.json"
    }  # fmt: skip
    assert not list(tmp_path.glob(".*"))
    model = onnx.load(to / "layer000.onnx")
    assert [one.name for one in model.graph.input] == ["hidden", "gate", "ramp"]
    assert model.opset_import[0].version == 20
    weights = Weights(Session.open(session))

    def read(name: str) -> torch.Tensor:
        shape = weights.shapes[name]
        data = b"".join(bytes(chunk) for chunk in weights.chunks(Stored(name, shape)))
        return torch.from_numpy(np.frombuffer(bytearray(data), np.float32).reshape(shape))

    w = {name: read(name) for name in weights.shapes}
    x = torch.arange(35).reshape(7, 5) % 11
    hidden = w["stem.tokens.weight"][x]
    gate = torch.sigmoid(F.linear(hidden.mean(1, keepdim=True), w["stem.gate.weight"], w["stem.gate.bias"]))
    for number in (0, 1, 0):
        name = f"layer{number:03d}"
        normed = F.layer_norm(hidden, (8,), w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])
        inner = F.linear(normed * torch.linspace(0.5, 1.5, 8), w[f"{name}.linear.weight"], w[f"{name}.linear.bias"])
        hidden = hidden + gate * torch.tanh(inner) + torch.linspace(0, 1, 5)[:, None]
    expected = F.linear(hidden.mean(1), w["head.out.weight"], w["head.out.bias"])
    np.testing.assert_allclose(StackRunner(to).run(x.numpy()), expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="a model of your own"):
        Manifest.read(to)
    assert run_cli("export", session, "--to", to).returncode == 0, "another one takes its place"
    for option in ("--int8", "--single-file"):
        done = run_cli("export", session, "--to", to, option)
        assert done.returncode == 2
        assert "a graph for each part" in done.stderr


def test_a_part_without_onnx_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    session = trained(tmp_path, "odd")
    done = run_cli("export", session, "--to", tmp_path / "x")
    assert done.returncode == 7
    assert "block 0 has no ONNX" in done.stderr
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))
