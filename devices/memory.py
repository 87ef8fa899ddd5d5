"""The memory that a budget is about: this process's, or that of a device which has its own. Imports no torch."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from devices import limits, meter

_NEAR_BYTES = 4 << 20
_RELIEVED_FOR_S, _TRIMMED_FOR_S = 0.5, 0.05


class Memory(abc.ABC):
    """What is in use, how much it was at most, and a limit on it."""

    reuses_freed: ClassVar[bool]
    """Whether ``limits.keep_freed_memory`` is a choice here: faster, and with holes."""
    counts_untouched: ClassVar[bool]
    """Whether what was allocated counts before it is touched."""
    counts_code: ClassVar[bool]
    """Whether a kernel takes of it when it first runs; which one runs depends on the sizes of tensors."""
    late_bytes: ClassVar[int]
    """What ``limit`` keeps free of a budget for that."""

    @abc.abstractmethod
    def resident_bytes(self) -> int:
        """In use by this process now."""

    @abc.abstractmethod
    def peak_bytes(self) -> int:
        """Most that was taken since the process began, or since ``reset_peak``."""

    @abc.abstractmethod
    def reset_peak(self) -> None:
        """Lets the peak start anew at what is in use."""

    @abc.abstractmethod
    def free_bytes(self, budget_bytes: int) -> int:
        """What can still be allocated within the budget; it can be negative."""

    @abc.abstractmethod
    def limit(self, budget_bytes: int) -> None:
        """From now on allocations beyond the budget fail, where the system can do that."""

    @abc.abstractmethod
    def lift(self) -> None:
        """Ends ``limit``."""

    @abc.abstractmethod
    def watch(
        self, budget_bytes: int, on_excess: Callable[[], None], planned_bytes: float = math.inf
    ) -> AbstractContextManager[None]:
        """Calls ``on_excess``, once, if the budget is exceeded by what ``limit`` does not bound. To be entered before
        ``limit``. Above ``planned_bytes`` freed memory that was kept goes back to the system."""


class HostMemory(Memory):
    """This process's own, as ``limits`` bounds it and ``meter`` sees it."""

    reuses_freed = True
    counts_untouched = False
    counts_code = False
    late_bytes = 0

    def __init__(self) -> None:
        self._file_bytes = 0

    def resident_bytes(self) -> int:
        return meter.usage().resident_bytes

    def peak_bytes(self) -> int:
        return meter.usage().peak_bytes

    def reset_peak(self) -> None:
        meter.reset_peak()

    def free_bytes(self, budget_bytes: int) -> int:
        used = self._usage()
        if not limits.supported():
            return budget_bytes - used.resident_bytes
        return limits.data_limit_for(budget_bytes, used) - used.data_bytes

    def limit(self, budget_bytes: int) -> None:
        if limits.supported():
            limits.set_data_limit(max(0, limits.data_limit_for(budget_bytes, self._usage())))

    def lift(self) -> None:
        limits.lift_data_limit()

    @contextmanager
    def watch(
        self, budget_bytes: int, on_excess: Callable[[], None], planned_bytes: float = math.inf
    ) -> Iterator[None]:
        # The monitor's thread and stack exist before the limit is drawn. What is over its margin is code: of that,
        # most is no longer in use.
        self._file_bytes = meter.usage().file_bytes
        try:
            relief = [
                meter.Relief(planned_bytes, limits.return_freed_memory, _TRIMMED_FOR_S),
                meter.Relief(budget_bytes - _NEAR_BYTES, limits.release_code, _RELIEVED_FOR_S),
            ]
            with meter.Monitor(budget_bytes, on_excess, relief=relief):
                yield
        finally:
            self._file_bytes = 0

    def _usage(self) -> meter.Usage:
        """With all code that was resident when the watch began: what is needed of it comes back."""
        used = meter.usage()
        more = max(0, self._file_bytes - used.file_bytes)
        return dataclasses.replace(used, file_bytes=used.file_bytes + more, resident_bytes=used.resident_bytes + more)
