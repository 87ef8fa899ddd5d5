"""Makes the budget hold: the limit on the memory that it is about, and the watch over what that cannot bound.

On Linux RLIMIT_DATA turns an excess of a process into an allocation error, which the engine answers by doing with
less; file-backed pages are outside of it, and a thread watches them. Elsewhere there is no such limit: plan and watch,
and say so. A device with memory of its own has a limit in torch's allocator; then the host's memory is watched alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from devices.memory import HostMemory, Memory
from edgetrain.errors import BudgetBroken, BudgetInfeasible
from edgetrain.units import advised_mib, format_bytes


class Governor:
    """Holds ``memory`` within ``budget_bytes``. ``exceeded`` turns true, for good, when a budget was broken.

    ``host_bytes``: of a device with memory of its own, what the process may have resident beside it; None: any amount.
    """

    def __init__(self, budget_bytes: int, memory: Memory | None = None, host_bytes: int | None = None) -> None:
        self.budget_bytes, self.host_bytes = budget_bytes, host_bytes
        self.memory = memory or HostMemory()
        self.exceeded = False

    @contextmanager
    def hold(self, needed_bytes: int = 0, planned_bytes: float = math.inf) -> Iterator[Governor]:
        """The budget in force. To be entered when buffers are touched and every operation ran once.

        Args:
            needed_bytes: what must still be free to allocate.
            planned_bytes: beyond which freed memory that was kept goes back to the system.

        Raises:
            BudgetInfeasible: less than that is left.
        """
        if self.host_bytes is not None and HostMemory().peak_bytes() > self.host_bytes:
            self.check()
        host = nullcontext() if self.host_bytes is None else HostMemory().watch(self.host_bytes, self._on_excess)
        with host, self.memory.watch(self.budget_bytes, self._on_excess, planned_bytes):
            lacking = needed_bytes - self.memory.free_bytes(self.budget_bytes)
            if lacking > 0:
                raise BudgetInfeasible(
                    f"{format_bytes(self.budget_bytes)} are too little: before the first step "
                    f"{format_bytes(self.budget_bytes + lacking - needed_bytes)} are taken, with what comes in later, "
                    f"and {format_bytes(needed_bytes)} are needed beside them",
                    f"Use --memory-budget {advised_mib(self.budget_bytes + lacking)}MiB.",
                )
            self.memory.limit(self.budget_bytes)
            try:
                yield self
            finally:
                self.memory.lift()

    def _on_excess(self) -> None:
        self.exceeded = True

    def check(self) -> None:
        """Raises BudgetBroken if a budget was exceeded."""
        peak_bytes = self.memory.peak_bytes()
        if self.host_bytes is not None and HostMemory().peak_bytes() > self.host_bytes:
            raise BudgetBroken(
                f"the process reached {format_bytes(HostMemory().peak_bytes())} of host memory, over the "
                f"{format_bytes(self.host_bytes)} that it may have; what was committed stays",
                "Raise --host-memory, or leave it out.",
            )
        if self.exceeded or peak_bytes > self.budget_bytes:
            raise BudgetBroken(
                f"resident memory reached {format_bytes(peak_bytes)}, over the budget of "
                f"{format_bytes(self.budget_bytes)}; what was committed stays",
                "Raise --memory-budget, and please report this: the plan should have refused.",
            )
