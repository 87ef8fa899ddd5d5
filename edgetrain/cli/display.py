"""The live line on stderr. Quiet when stderr is no terminal.

Drawn by hand: a library for it takes more memory, with a thread and its stack, than a plan leaves free.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

from edgetrain.units import format_bytes, format_duration

if TYPE_CHECKING:
    from edgetrain.plan import Plan
    from edgetrain.training import Report

_EVERY_S = 0.2
_ERASE_TO_END = "\x1b[K"


class Display:
    """Shows block, visit, step, loss, rate, memory against budget, bytes moved and the time left."""

    def __init__(self, plan: Plan, quiet: bool) -> None:
        self._plan, self._quiet = plan, quiet
        self._last = 0.0

    def __enter__(self) -> Display:
        self._draw("starting")
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("")

    def show(self, report: Report) -> None:
        if self._quiet or time.monotonic() - self._last < _EVERY_S:
            return
        from devices.meter import resident_bytes_fast

        self._last = time.monotonic()
        loss = "skipped" if report.loss is None else f"{report.loss:.4f}"
        self._draw(
            f"block {report.block}  visit {report.visit}  step {report.step}/{report.steps}  loss {loss}  "
            f"{report.rate:.0f} {report.unit}/s  ETA {format_duration(report.eta_s)}  "
            f"{format_bytes(resident_bytes_fast()[0])} of {format_bytes(self._plan.budget_bytes)}  "
            f"read {format_bytes(report.bytes_read)}  written {format_bytes(report.bytes_written)}"
        )

    def _draw(self, text: str) -> None:
        """In place of the line before; cut to the terminal's width, for one that wraps cannot be drawn over."""
        if not self._quiet:
            width = shutil.get_terminal_size().columns
            print(f"\r{text[: width - 1]}{_ERASE_TO_END}", end="", file=sys.stderr, flush=True)
