"""Makes the budget hold: the order of start-up, the limit on the process, and the watch over what it cannot bound.

On Linux RLIMIT_DATA turns an excess into an allocation error, which the engine answers by doing with less; file-backed
pages are outside of it, and a thread watches them. Elsewhere there is no such limit: plan and watch, and say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from devices import limits, meter
from edgetrain.errors import BudgetBroken
from edgetrain.units import format_bytes


class Governor:
    """Watches one process under ``budget_bytes``. ``exceeded`` turns true, for good, when the budget was broken."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.exceeded = False

    @contextmanager
    def hold(self, needed_bytes: int = 0) -> Iterator[Governor]:
        """The budget in force. To be entered when buffers are touched and every operation ran once.

        Args:
            needed_bytes: what must still be free to allocate.

        Raises:
            BudgetBroken: less than that is left.
        """
        # The monitor's thread and stack exist before the limit is drawn. What is over its margin is code: of that,
        # most is no longer in use.
        before = meter.usage()
        with meter.Monitor(self.budget_bytes, self._on_excess, relieve=limits.release_code):
            used = meter.usage()
            if used.file_bytes < before.file_bytes:  # relieved already: what is needed of it comes back
                more = before.file_bytes - used.file_bytes
                used = dataclasses.replace(
                    used, file_bytes=before.file_bytes, resident_bytes=used.resident_bytes + more
                )
            if not limits.supported():
                yield self
                return
            limit = limits.data_limit_for(self.budget_bytes, used)
            if limit - used.data_bytes < needed_bytes:
                raise BudgetBroken(
                    f"{format_bytes(used.resident_bytes)} are in use before the first step: the "
                    f"budget of {format_bytes(self.budget_bytes)} leaves less than {format_bytes(needed_bytes)}",
                    "Raise --memory-budget a little.",
                )
            limits.set_data_limit(limit)
            try:
                yield self
            finally:
                limits.lift_data_limit()

    def _on_excess(self) -> None:
        self.exceeded = True

    def check(self) -> None:
        """Raises BudgetBroken if the budget was exceeded."""
        if self.exceeded or meter.usage().peak_bytes > self.budget_bytes:
            raise BudgetBroken(
                f"resident memory reached {format_bytes(meter.usage().peak_bytes)}, over the budget of "
                f"{format_bytes(self.budget_bytes)}; what was committed stays",
                "Raise --memory-budget, and please report this: the plan should have refused.",
            )
