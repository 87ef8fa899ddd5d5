"""The live line on stderr. Quiet when stderr is no terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edgetrain.units import format_bytes, format_duration

if TYPE_CHECKING:
    from edgetrain.plan import Plan
    from edgetrain.training import Report

_EVERY_S = 0.2


class Display:
    """Shows block, visit, step, loss, rate, memory against budget, bytes moved and the time left."""

    def __init__(self, plan: Plan, quiet: bool) -> None:
        self._plan, self._quiet = plan, quiet
        self._status: Any = None
        self._last = 0.0

    def __enter__(self) -> Display:
        if not self._quiet:
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, report: Report) -> None:
        if self._status is None or time.monotonic() - self._last < _EVERY_S:
            return
        from devices.meter import resident_bytes_fast

        self._last = time.monotonic()
        loss = "skipped" if report.loss is None else f"{report.loss:.4f}"
        self._status.update(
            f"block {report.block}  visit {report.visit}  step {report.step}/{report.steps}  loss {loss}  "
            f"{report.images_per_s:.0f} images/s  {format_bytes(resident_bytes_fast()[0])} of "
            f"{format_bytes(self._plan.budget_bytes)}  read {format_bytes(report.bytes_read)}  "
            f"written {format_bytes(report.bytes_written)}  ETA {format_duration(report.eta_s)}"
        )
