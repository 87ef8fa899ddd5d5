"""Apple GPUs through torch.mps."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from devices.base import Buffer, Capabilities, CompletedEvent, Device, DeviceOutOfMemory, Event, Profile, Tier
from devices.buffers import MemoryBuffer, host_buffer
from devices.cpu import host_memory_bytes, usable_cores

if TYPE_CHECKING:
    import torch


class MpsDevice(Device):
    """An Apple GPU, whose memory is the host's. Copies run within the call. Untested on hardware.

    torch keeps no peak for it: ``peak_bytes`` is the largest amount seen at an allocation or a call.
    """

    kind = "mps"

    def __init__(self, scratch: Path | None = None) -> None:
        super().__init__(scratch)
        self._cap: int | None = None
        self._peak = self.allocated_bytes()

    @classmethod
    def detect(cls) -> Profile | None:
        if sys.platform != "darwin" or platform.machine() != "arm64":
            return None
        import torch

        if not torch.backends.mps.is_available():
            return None
        capabilities = Capabilities(
            host_addressable=False,
            unified_memory=True,
            enforces_cap=True,
            pinned_host=False,
            async_copies=False,
            bfloat16=torch.backends.mps.is_macos_or_newer(14, 0),
        )
        memory_bytes = torch.mps.recommended_max_memory()
        return Profile("Apple GPU", cls.kind, memory_bytes, host_memory_bytes(), usable_cores(), capabilities)

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("mps")

    def set_cap(self, nbytes: int | None) -> None:
        import torch

        fraction = 1.0 if nbytes is None else min(nbytes / self.profile().device_memory_bytes, 1.0)
        torch.mps.set_per_process_memory_fraction(fraction)
        self._cap = nbytes
        self._peak = self.allocated_bytes()

    def allocated_bytes(self) -> int:
        import torch

        return torch.mps.current_allocated_memory()

    def peak_bytes(self) -> int:
        self._peak = max(self._peak, self.allocated_bytes())
        return self._peak

    def synchronize(self) -> None:
        import torch

        torch.mps.synchronize()

    def _allocate(self, nbytes: int, tier: Tier) -> MemoryBuffer:
        import torch

        if tier is Tier.HOST:
            return host_buffer(nbytes)
        try:
            data = torch.empty(nbytes, dtype=torch.uint8, device="mps")
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise DeviceOutOfMemory(nbytes, self.allocated_bytes(), self._cap) from error
        self.peak_bytes()
        return MemoryBuffer(data, tier, False)

    def _copy(
        self, source: Buffer, source_offset: int, destination: Buffer, destination_offset: int, nbytes: int
    ) -> Event:
        if isinstance(source, MemoryBuffer) and isinstance(destination, MemoryBuffer):
            origin = source.data[source_offset : source_offset + nbytes]
            destination.data[destination_offset : destination_offset + nbytes].copy_(origin)
            self.synchronize()
        else:
            self._copy_through_disk(source, source_offset, destination, destination_offset, nbytes)
        return CompletedEvent()
