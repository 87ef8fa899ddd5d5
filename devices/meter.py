"""Memory of processes, measured: this one, another one, a whole tree of them. Imports no torch."""

from __future__ import annotations

import abc
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Usage:
    """A process's memory in bytes. Off Linux only the first two are known, the others 0."""

    peak_bytes: int
    """Most ever resident (VmHWM); off Linux the system's nearest figure."""
    resident_bytes: int
    """Resident now: anonymous + file + shared."""
    anonymous_bytes: int
    file_bytes: int
    shared_bytes: int
    data_bytes: int
    """Private writable address space, touched or not (VmData): what RLIMIT_DATA bounds."""
    stack_bytes: int
    """The main thread's stack (VmStk), which RLIMIT_DATA does not bound."""
    swapped_bytes: int = 0


def usage(pid: int | None = None) -> Usage:
    """Memory of process ``pid``, None for this one. Some 50 us.

    Raises:
        ProcessLookupError: there is no such process, or it has ended.
    """
    if not _PROC.joinpath("self/status").exists():
        return _usage_elsewhere(pid)
    try:
        status = _PROC.joinpath("self" if pid is None else str(pid), "status").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in fields:
        raise ProcessLookupError(f"process {pid} has ended, or is the kernel's")
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmData", "VmStk", "VmSwap")
    return Usage(*(int(fields[name].split()[0]) * 1024 for name in names))


def _usage_elsewhere(pid: int | None) -> Usage:
    import psutil

    try:
        info = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"no process {pid}") from error
    peak_bytes = getattr(info, "peak_wset", info.rss)
    if sys.platform == "darwin" and pid is None:
        import resource

        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return Usage(peak_bytes, info.rss, 0, 0, 0, 0, 0)


class _Statm:
    """/proc/self/statm through one descriptor, opened anew after a fork."""

    def __init__(self) -> None:
        self._pid = -1
        self._descriptor = -1

    def read(self) -> tuple[int, int]:
        if self._pid != os.getpid():
            if self._descriptor >= 0:
                os.close(self._descriptor)  # names the parent
            self._descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
            self._pid = os.getpid()
        _, resident, shared, *_ = os.pread(self._descriptor, 128, 0).split()
        return int(resident) * _PAGE_BYTES, int(shared) * _PAGE_BYTES


_statm = _Statm() if _PROC.joinpath("self/statm").exists() else None


def resident_bytes_fast() -> tuple[int, int]:
    """(resident, file-backed) bytes of this process, in some 2 us; shared memory counts as file-backed.

    Off Linux it is slower, and file-backed bytes are 0.
    """
    if _statm is not None:
        return _statm.read()
    return usage().resident_bytes, 0


class _Sampler(abc.ABC):
    """Calls ``_sample`` every ``poll_s`` seconds in a daemon thread, from ``start`` to ``stop`` or within ``with``."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    @abc.abstractmethod
    def _sample(self) -> None: ...

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_s):
            self._sample()

    def start(self) -> None:
        """Begin, with a sample taken at once. A meter starts once.

        Raises:
            RuntimeError: it was started before.
        """
        self._sample()
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples; harmless again, before ``start``, and from within a callback."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Relief:
    """What can be done about memory before it is too much: ``action``, above ``above_bytes``, and not again for
    ``every_s`` seconds."""

    above_bytes: float
    action: Callable[[], None]
    every_s: float


class Monitor(_Sampler):
    """Watches this process's resident memory and calls ``on_excess``, once, when it exceeds ``budget_bytes``.

    The callback runs in the monitor's thread (or in ``start``, if the budget is exceeded already). A peak
    shorter than ``poll_s`` can be missed: this sees file-backed pages grow, which no limit bounds, and does
    not replace the limit. Start it before ``limits.data_limit_for`` measures: its stack is data too.
    ``relief`` comes before that, each above its own threshold.
    """

    def __init__(
        self,
        budget_bytes: int,
        on_excess: Callable[[], None],
        poll_s: float = 0.005,
        relief: Sequence[Relief] = (),
    ) -> None:
        super().__init__(poll_s)
        self._relief = dict.fromkeys(relief, -math.inf)
        self.peak_bytes = 0
        """Most resident bytes seen."""
        self._budget_bytes = budget_bytes
        self._on_excess: Callable[[], None] | None = on_excess

    def _sample(self) -> None:
        resident, _ = resident_bytes_fast()
        self.peak_bytes = max(self.peak_bytes, resident)
        for one, last_s in self._relief.items():
            if resident > one.above_bytes and time.monotonic() - last_s > one.every_s:
                with contextlib.suppress(Exception):  # above all, there may be no memory for it: the watch goes on
                    one.action()
                self._relief[one] = time.monotonic()
        if resident > self._budget_bytes and self._on_excess is not None:
            on_excess, self._on_excess = self._on_excess, None
            on_excess()


class TreeMeter(_Sampler):
    """Measures process ``pid`` and its descendants, for benchmarks.

    Pages that several processes share, such as libraries, count once for each: the sum errs upwards.
    """

    def __init__(self, pid: int, poll_s: float = 0.02) -> None:
        super().__init__(poll_s)
        self.peak_bytes = 0
        """Most bytes resident over the tree at one sample."""
        self.high_water_bytes: dict[int, int] = {}
        """Each process's own VmHWM by pid, as last seen alive."""
        self._pid = pid

    def _sample(self) -> None:
        import psutil

        try:
            root = psutil.Process(self._pid)
            pids = [self._pid, *(child.pid for child in root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        total = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                measured = usage(pid)
                total += measured.resident_bytes
                self.high_water_bytes[pid] = max(self.high_water_bytes.get(pid, 0), measured.peak_bytes)
        self.peak_bytes = max(self.peak_bytes, total)


def reset_peak() -> bool:
    """Let this process's ``peak_bytes`` start anew at what is resident now; False where the system cannot."""
    try:
        _PROC.joinpath("self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
