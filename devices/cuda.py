"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from devices.base import Buffer, Capabilities, CompletedEvent, Device, DeviceOutOfMemory, Event, Profile, Tier
from devices.buffers import MemoryBuffer
from devices.cpu import host_memory_bytes, usable_cores
from devices.memory import Memory

if TYPE_CHECKING:
    import torch


LATE_BYTES = 32 << 20
"""Kept free below a cap: the code of a kernel is loaded when it first runs."""


class CudaDevice(Device):
    """The current GPU.

    The cap and the peak are device memory as the driver sees it: the context (some hundred MB of it) plus
    what torch has reserved. HOST buffers are pinned; torch rounds their sizes up to powers of two and
    keeps released ones for reuse. Copies run on a stream of their own; those with a disk end run within
    the call.
    """

    kind = "cuda"
    _segments_grow = sys.platform == "linux"

    def __init__(self, scratch: Path | None = None) -> None:
        super().__init__(scratch)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or a product's rounding may vary
        import torch

        if self._segments_grow and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # which leave next to no holes
        if not torch.are_deterministic_algorithms_enabled():  # a program may have said that a warning will do
            torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch._C._set_deterministic_fill_uninitialized_memory(False)  # a debugging aid, at the price of a write
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self._device)
        torch.empty(1, device=self._device)  # creates the context
        self._cap: int | None = None
        self._context_bytes = self.context_bytes()

    @classmethod
    def detect(cls) -> Profile | None:
        return None if "jetson" in board_model().lower() else cls._detect()

    @classmethod
    def _detect(cls) -> Profile | None:
        if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvhost-gpu").exists() or shutil.which("nvidia-smi")):
            return None
        import torch

        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        capabilities = Capabilities(
            host_addressable=False,
            unified_memory=bool(properties.is_integrated),
            enforces_cap=True,
            pinned_host=True,
            async_copies=True,
            bfloat16=torch.cuda.is_bf16_supported(),
        )
        memory_bytes = properties.total_memory
        return Profile(properties.name, cls.kind, memory_bytes, host_memory_bytes(), usable_cores(), capabilities)

    @property
    def torch_device(self) -> torch.device:
        return self._device

    @cached_property
    def memory(self) -> Memory:
        return _OwnMemory(self)

    def set_cap(self, nbytes: int | None) -> None:
        """As in ``Device``; the context counts, with some room for code that is loaded later."""
        import torch

        total_bytes = self.profile().device_memory_bytes
        reservable = total_bytes if nbytes is None else min(nbytes, total_bytes) - self.context_bytes() - LATE_BYTES
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(max(0, reservable) / total_bytes, self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._cap = nbytes

    def allocated_bytes(self) -> int:
        import torch

        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """Context plus most reserved by torch; what the driver reports now, if that is more."""
        import torch

        return max(torch.cuda.max_memory_reserved(self._device) + self._context_bytes, self._process_bytes())

    def context_bytes(self) -> int:
        """What this process has beside torch's allocations now: the driver's context, code, libraries' own memory."""
        import torch

        self._context_bytes = max(0, self._process_bytes() - torch.cuda.memory_reserved(self._device))
        return self._context_bytes

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self._device)

    def _process_bytes(self) -> int:
        """Device memory of this process after NVML; of all processes, an upper bound, where NVML can't tell."""
        import torch

        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
            own = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
        except Exception:  # not installed, or one of NVML's own errors: containers and Jetsons hide it
            own = []
        if own and own[0] is not None:
            return int(own[0])
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes

    def _allocate(self, nbytes: int, tier: Tier) -> MemoryBuffer:
        import torch

        try:
            if tier is Tier.HOST:
                return MemoryBuffer(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), tier, True)
            return MemoryBuffer(torch.empty(nbytes, dtype=torch.uint8, device=self._device), tier, False)
        except torch.cuda.OutOfMemoryError as error:
            in_use = torch.cuda.memory_reserved(self._device) + self._context_bytes
            raise DeviceOutOfMemory(nbytes, in_use, self._cap) from error

    def _copy(
        self, source: Buffer, source_offset: int, destination: Buffer, destination_offset: int, nbytes: int
    ) -> Event:
        import torch

        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        if not (isinstance(source, MemoryBuffer) and isinstance(destination, MemoryBuffer)):
            self._copies.synchronize()  # the disk has no stream: earlier copies first
            self._copy_through_disk(source, source_offset, destination, destination_offset, nbytes)
            return CompletedEvent()
        origin = source.data[source_offset : source_offset + nbytes]
        target = destination.data[destination_offset : destination_offset + nbytes]
        if source.tier is destination.tier is Tier.HOST:
            self._copies.synchronize()
            target.copy_(origin)
            return CompletedEvent()
        with torch.cuda.stream(self._copies):
            target.copy_(origin, non_blocking=True)
            for memory in (origin, target):
                if memory.is_cuda:
                    memory.record_stream(self._copies)  # not to be reused while the copy runs
            return _StreamEvent(self._copies.record_event())


class _OwnMemory(Memory):
    """The GPU's: its context counts, and of what torch reserved at its peak all."""

    reuses_freed = False  # torch's allocator does, always
    counts_untouched = True
    counts_code = True
    late_bytes = LATE_BYTES

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._peak_bytes = 0

    def resident_bytes(self) -> int:
        return self._device.allocated_bytes() + self._device.context_bytes()

    def peak_bytes(self) -> int:
        return max(self._peak_bytes, self._device.peak_bytes())

    def reset_peak(self) -> None:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device.torch_device)
        self._peak_bytes = 0

    def free_bytes(self, budget_bytes: int) -> int:
        return budget_bytes - self.resident_bytes() - LATE_BYTES

    def limit(self, budget_bytes: int) -> None:
        self._peak_bytes = self.peak_bytes()  # a new cap starts a new one
        self._device.set_cap(budget_bytes)

    def lift(self) -> None:
        self._peak_bytes = self.peak_bytes()
        self._device.set_cap(None)

    def watch(
        self, budget_bytes: int, on_excess: Callable[[], None], planned_bytes: float = math.inf
    ) -> AbstractContextManager[None]:
        return nullcontext()  # the cap bounds all but the context, which is looked at in the end


class _StreamEvent(Event):
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        # The host waits, not only the compute stream: it may write the source or read the destination next.
        self._event.synchronize()

    def done(self) -> bool:
        return self._event.query()


def board_model() -> str:
    """The board's name where firmware gives one (a Jetson, a Raspberry Pi), else ""."""
    path = Path("/proc/device-tree/model")
    return path.read_text(errors="replace").rstrip("\0\n") if path.exists() else ""
