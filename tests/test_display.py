"""The live line: what a terminal gets, and that it takes no memory which the plan did not count."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from edgetrain.cli.display import Display
from edgetrain.training import Report
from tests.exporters.common import run_python

PLAN: Any = SimpleNamespace(budget_bytes=300 << 20)
REPORT = Report(1, 2, 30, 400, 0.5, 123.4, "images", 30, 800, 60.0, 1 << 20, 2 << 20)


@pytest.fixture
def narrow(monkeypatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 24)))


def test_one_line_is_drawn_again_and_wiped(narrow, capsys):
    with Display(PLAN, quiet=False) as display:
        starting = capsys.readouterr().err
        assert starting == "\rstarting\x1b[K", "before the first step: what drawing needs is in memory then"
        display.show(REPORT)
        display.show(REPORT)  # too soon after the other
    _, line, wiped = capsys.readouterr().err.split("\r")
    assert line.startswith("block 1  visit 2  step 30/400  loss 0.5000")
    assert len(line.removesuffix("\x1b[K")) == 59, "cut: a line that wraps could not be drawn over"
    assert wiped == "\x1b[K"


def test_quiet(capsys):
    with Display(PLAN, quiet=True) as display:
        display.show(REPORT)
    assert capsys.readouterr().err == ""


def test_it_brings_no_library():
    code = """
import sys
from types import SimpleNamespace
from edgetrain.cli.display import Display
from devices import meter
before = set(sys.modules)
with Display(SimpleNamespace(budget_bytes=1), quiet=False):
    pass
print({name.partition(".")[0] for name in set(sys.modules) - before} <= sys.stdlib_module_names)
"""
    assert run_python(code).strip() == "True"
