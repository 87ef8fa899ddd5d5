"""A stack in a file of its own, trained by command: kills, other models, the budget, and the page's example."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetrain.errors import BadInput, UsageError
from edgetrain.session import Session
from edgetrain.stack import load_stack, source_hash
from tests.cli.workplace import Workplace

pytestmark = pytest.mark.usefixtures("one_thread")


def test_files_that_hold_no_stack(tmp_path: Path) -> None:
    def source(name: str, text: str, function: str = "build") -> str:
        (tmp_path / name).write_text(text)
        return f"{tmp_path / name}:{function}"

    for given, error, message in (
        ("my.py", UsageError, "names no function in a file"),
        ("my.txt:build", UsageError, "names no function in a file"),
        (f"{tmp_path}/none.py:build", UsageError, "there is no file"),
        (source("empty.py", ""), UsageError, "has no function build"),
        (source("broken.py", "x = (\n"), BadInput, "cannot be run: SyntaxError"),
        (source("raising.py", "\n1 / 0\n"), BadInput, "ZeroDivisionError: division by zero (raising.py, line 2)"),
        (source("failing.py", "def build():\n    return [][0]\n"), BadInput, "(failing.py, line 2)"),
        (source("other.py", "def build():\n    return 3\n"), BadInput, "returns a int"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            load_stack(given)
    assert source_hash("none.py:build") == "" != source_hash(source("empty.py", "x = 1"))


FILE = """
import torch, edgetrain
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(width, 4 * width), nn.Dropout(0.1), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.drop(self.up(x).relu()))

class Data:
    def __len__(self):
        return 256

    def __getitem__(self, i):
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(i))
        return x, x.flip(0)

WIDTH, DEPTH = {width}, {depth}

def build():
    return edgetrain.Stack(
        stem=lambda: nn.Linear(WIDTH, WIDTH), blocks=[lambda: Block(WIDTH)] * DEPTH,
        loss=lambda output, target: (output - target).square().mean(), data=Data(),
    )
"""


def write(place: Workplace, name: str, width: int, depth: int) -> Path:
    path = place.folder / name
    path.write_text(FILE.replace("{width}", str(width)).replace("{depth}", str(depth)))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("run"))


def run(place: Workplace, session: str, *arguments: object, **options: Any) -> dict[str, Any]:
    budget = ["--memory-budget", "330MiB", "--set", "train.batch_size=8", "--set", "train.micro_batch=8"]
    return place.json("run", "my.py:build", session, *budget, "--threads", 1, *arguments, **options)


def test_the_command_trains_and_resumes_after_a_kill(place: Workplace) -> None:
    write(place, "my.py", 32, 3)
    every = ["--set", "train.visit_steps=5", "--set", "train.steps=400"]
    expected = run(place, "whole", *every)
    assert (expected["status"], expected["step"]) == ("complete", 400)
    assert expected["peak_bytes"] <= expected["budget_bytes"]
    killed = place.start(
        "run", "my.py:build", "killed", "--memory-budget", "330MiB", "--set", "train.batch_size=8", "--set",
        "train.micro_batch=8", "--threads", 1, *every,
    )  # fmt: skip
    session, step = place.folder / "killed", 0
    for _ in range(1200):
        if Session.exists(session) and (step := Session.open(session).progress(0).step) >= 20:
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert 0 < step < 400, "or nothing was killed"
    assert run(place, "killed", *every)["digest"] == expected["digest"]
    # Other commands find the model by the file's place, from anywhere.
    assert place.json("status", "killed")["step"] == 400
    assert place.json("verify", "killed")["digest"] == expected["digest"]
    assert place.json("plan", "killed", "--threads", 1)["choice"]["micro_batch"] == 8
    assert place.json("train", "killed", "--threads", 1, "--steps", 402)["step"] == 402
    # A program that names the file trains the same session, measured by a process beside it.
    code = """
import json, sys, warnings, torch, edgetrain
warnings.simplefilter("ignore")
training = edgetrain.Training("my.py:build", "whole", memory_budget="400MiB", steps=402, threads=1)
print(json.dumps(training.train()))
assert training.state_dict()["blocks.2.up.weight"].shape == (128, 32)
assert not {"sympy", "torch._dynamo"} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=place.environment,
        cwd=place.folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == place.json("status", "killed")["digest"]


def test_another_model_is_refused(place: Workplace) -> None:
    write(place, "my.py", 32, 3)
    run(place, "refusing", "--steps", 1)
    for name, width, depth, message in (
        ("wider.py", 48, 3, "stem.bias is [48] in the stack, and [32] in"),
        ("deeper.py", 32, 4, "the stack has 4 blocks, and the session 3"),
    ):
        write(place, name, width, depth)
        assert message in place.fails(2, "run", f"{name}:build", "refusing", "--threads", 1)
    (place.folder / "my.py").rename(place.folder / "moved.py")
    assert "there is no file" in place.fails(2, "train", "refusing", "--threads", 1)
    moved = place.json("run", "moved.py:build", "refusing", "--threads", 1, "--steps", 2)
    assert moved["step"] == 2
    assert Session.open(place.folder / "refusing").spec.data.source == f"{place.folder}/moved.py:build"
    assert "too little" in place.fails(3, "run", "moved.py:build", "new", "--memory-budget", "100MiB", "--threads", 1)
    assert not (place.folder / "new").exists()
    write(place, "bad.py", 8, 2)
    text = (place.folder / "bad.py").read_text()
    (place.folder / "bad.py").write_text(text.replace("nn.Linear(4 * width, width)", "nn.Linear(3 * width, width)"))
    said = place.fails(7, "run", "bad.py:build", "bad", "--memory-budget", "330MiB", "--threads", 1)
    assert re.match(r"edgetrain: block \d failed: RuntimeError: .*\(bad.py, line 11\)", said)
    assert not (place.folder / "bad").exists()


def test_a_state_of_twice_the_budget_is_trained_within_it(place: Workplace) -> None:
    write(place, "my.py", 512, 24)
    done = run(place, "large", "--steps", 2)
    session = Session.open(place.folder / "large")
    state_bytes = 3 * sum(layout.section_bytes("weight") for layout in session.store.trained_layouts)
    assert state_bytes > 1.7 * done["budget_bytes"]
    assert done["peak_bytes"] <= done["budget_bytes"] == 330 << 20
    assert abs(done["peak_bytes"] - done["plan_peak_bytes"]) < 12 << 20


def test_the_example_of_the_page_runs_as_printed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "your-own-model.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    place = Workplace(tmp_path)
    (tmp_path / "my.py").write_text(code)
    printed = re.search(r"^edgetrain (run my\.py:build \S+ --memory-budget \S+ --steps \d+)$", page, re.MULTILINE)
    assert printed is not None
    done = place.json(*printed[1].split(), "--threads", 1)
    assert (done["status"], done["step"]) == ("complete", 200)
    assert done["peak_bytes"] <= done["budget_bytes"]
    assert done["loss"] < 0.4, "it learns"
    assert place.json("doctor", "session", "--threads", 1)["ok"]
