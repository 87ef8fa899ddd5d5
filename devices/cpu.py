"""The CPU as a device: its device tier is ordinary anonymous memory."""

from __future__ import annotations

import os
import platform
import re
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from devices.base import Buffer, Capabilities, CompletedEvent, Device, DeviceOutOfMemory, Event, Profile, Tier
from devices.buffers import MemoryBuffer, anonymous_memory, host_buffer, over

if TYPE_CHECKING:
    import torch


class CpuDevice(Device):
    """Computes where the host does; copies run within the call.

    The cap is checked against the sum of DEVICE buffers, restored activations among them. What torch
    allocates by itself is not seen here: the limit on the whole process is the work of ``limits``.
    """

    kind = "cpu"

    def __init__(self, scratch: Path | None = None) -> None:
        super().__init__(scratch)
        self._cap: int | None = None
        self._in_use = 0
        self._peak = 0
        # The garbage collector may free memory at any moment, while the lock is held too: sizes
        # given back wait in a deque, whose appends are atomic, until somebody counts.
        self._returned: deque[int] = deque()
        self._lock = threading.Lock()

    @classmethod
    def detect(cls) -> Profile | None:
        capabilities = Capabilities(
            host_addressable=True,
            unified_memory=True,
            enforces_cap=True,
            pinned_host=False,
            async_copies=False,
            bfloat16=True,
        )
        memory_bytes = host_memory_bytes()
        return Profile(_processor_name(), cls.kind, memory_bytes, memory_bytes, usable_cores(), capabilities)

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def set_cap(self, nbytes: int | None) -> None:
        with self._lock:
            self._cap = nbytes
            self._peak = self._count()

    def allocated_bytes(self) -> int:
        with self._lock:
            return self._count()

    def peak_bytes(self) -> int:
        return self._peak

    def synchronize(self) -> None:
        pass

    def _count(self) -> int:
        while self._returned:
            self._in_use -= self._returned.popleft()
        return self._in_use

    def _allocate(self, nbytes: int, tier: Tier) -> MemoryBuffer:
        if tier is Tier.HOST:
            return host_buffer(nbytes)
        with self._lock:
            in_use = self._count()
            if self._cap is not None and in_use + nbytes > self._cap:
                raise DeviceOutOfMemory(nbytes, in_use, self._cap)
            memory = anonymous_memory(nbytes)
            weakref.finalize(memory, self._returned.append, nbytes)
            self._in_use += nbytes
            self._peak = max(self._peak, self._in_use)
        return over(memory, nbytes, tier, self.capabilities.host_addressable)

    def _copy(
        self, source: Buffer, source_offset: int, destination: Buffer, destination_offset: int, nbytes: int
    ) -> Event:
        if isinstance(source, MemoryBuffer) and isinstance(destination, MemoryBuffer):
            origin = source.data[source_offset : source_offset + nbytes]
            destination.data[destination_offset : destination_offset + nbytes] = origin
        else:
            self._copy_through_disk(source, source_offset, destination, destination_offset, nbytes)
        return CompletedEvent()


def host_memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
