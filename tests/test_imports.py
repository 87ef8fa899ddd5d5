"""Imports point down only, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.devices.subprocesses import run_python

ROOT = Path(__file__).parents[1]
NO_TORCH = (
    "store",
    "noise",
    "randomness",
    "data",
    "spec",
    "recipe",
    "errors",
    "units",
    "stages",
    "stack",
    "moves",
    "pieces",
    "plan",
    "session",
    "architectures",
    "adapters",
    "checkpoint",
    "generation",
    "vocabulary",
    "importing",
    "planning",
    "streamed_plan",
    "masking",
    "schedule",
    "training_data",
    "parameters",
    "engine",
    "governor",
)
# From the bottom up: a module imports from its own layer and from those before it.
LAYERS = (
    ("", "errors", "units"),
    ("noise", "randomness", "store", "data"),
    ("spec",),
    ("recipe",),
    ("architectures", "checkpoint", "stages", "pieces", "moves"),
    ("adapters", "generation", "masking", "stack", "vocabulary", "training_data", "parameters"),
    ("plan", "governor", "session"),
    ("importing", "streamed_plan", "planning", "schedule"),
    ("models", "optim", "activations", "tiles", "resident", "residency", "boundaries", "table", "objectives"),
    ("engine",),
    ("blockwise", "streamed"),
    ("streamed_probe", "probe"),
    ("sampling", "image_sampling", "text_sampling", "training", "inference"),
    ("doctor",),
    ("cli",),
    ("api",),  # a program that trains is a user of the probe as the commands are
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """The full names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_devices_and_exporters_stand_below_or_beside():
    for path in (ROOT / "devices").glob("**/*.py"):
        assert not tops(path) & {"edgetrain", "exporters"}, path
    for path in (ROOT / "edgetrain").glob("**/*.py"):
        if "cli" not in path.parts:
            assert "exporters" not in tops(path), path


def test_imports_point_down():
    found = 0
    for path in (ROOT / "edgetrain").glob("**/*.py"):
        own = path.relative_to(ROOT / "edgetrain").parts[0].removesuffix(".py")
        if own not in RANK:
            assert own == "__init__", f"{own} has no layer"  # the front door, which is lazy
            continue
        for name in imported(path):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "edgetrain" and other in RANK:
                found += 1
                assert RANK[other] <= RANK[own], f"{path} imports {name}"
    assert found > 50


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_below(name):
    assert run_python(f"import sys, edgetrain.{name}; print('torch' in sys.modules)").strip() == "False"


def test_devices_without_torch():
    code = "import sys, devices, devices.limits, devices.meter; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize("kind", ["auto", "cpu", "emulated"])
def test_no_accelerator_is_looked_for_unless_asked(kind):
    """That would import torch before the limits are prepared."""
    code = f"""
import devices, edgetrain.cli.options as options
def detect(kind):
    raise AssertionError(kind)
devices.detect = detect
options.check_device({kind!r})
print("fine")
"""
    assert run_python(code).strip() == "fine"


def test_only_the_kind_that_is_asked_for_is_looked_for():
    code = """
import devices, edgetrain.cli.options as options
looked = []
devices.detect = looked.append
try:
    options.check_device("cuda")
except options.UsageError:
    print(looked[0])
"""
    assert run_python(code).strip() == "cuda"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_front_page_imports_neither_numpy_nor_torch(arguments):
    code = f"""
import sys
sys.argv = ["edgetrain", *{arguments}]
from edgetrain.cli.main import main
assert not main.main(standalone_mode=False)
print([m for m in ("numpy", "torch", "onnx", "onnxruntime", "PIL", "psutil") if m in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"
