"""Buffers: flat ranges of bytes in one of three tiers."""

from __future__ import annotations

import abc
import enum
import errno
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from devices.scratch import Extent, Scratch

if TYPE_CHECKING:
    import torch

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Tier(enum.Enum):
    """Where a buffer's bytes are."""

    DEVICE = "device"
    """The memory that the device computes in."""
    HOST = "host"
    """Memory of the host process, pinned where the device can make use of that."""
    DISK = "disk"
    """The scratch file."""


class DeviceOutOfMemory(MemoryError):
    """A device's cap, or its memory, does not hold what was asked for. Sizes in bytes; ``cap`` is None if unset."""

    def __init__(self, requested: int, in_use: int, cap: int | None) -> None:
        limit = f"cap {cap} bytes" if cap is not None else "no cap set"
        super().__init__(f"device out of memory: requested {requested} bytes, {in_use} bytes in use, {limit}")
        self.requested, self.in_use, self.cap = requested, in_use, cap


class Buffer(abc.ABC):
    """``nbytes`` bytes in one tier. Made by ``Device.buffer``; any use after ``release`` raises ValueError."""

    def __init__(self, nbytes: int, tier: Tier) -> None:
        self.nbytes = nbytes
        self.tier = tier

    @property
    def host_addressable(self) -> bool:
        """Whether ``host`` works."""
        return False

    @property
    def host(self) -> memoryview:
        """The bytes themselves, writable.

        Raises:
            ValueError: the host cannot address this buffer.
        """
        raise ValueError(f"the host cannot address a buffer of the {self.tier.value} tier here")

    def tensor(self, dtype: torch.dtype, offset_bytes: int, shape: Sequence[int]) -> torch.Tensor:
        """A contiguous tensor that shares the buffer's bytes from ``offset_bytes`` on and keeps them alive.

        Raises:
            ValueError: it does not fit, is not aligned to the dtype, or the buffer is on disk.
        """
        raise ValueError(f"a buffer of the {self.tier.value} tier has no tensors")

    def touch(self) -> None:  # noqa: B027 (nothing to do unless pages are given lazily)
        """Make every page resident now, leaving its content: later use cannot grow the process."""

    @abc.abstractmethod
    def release(self) -> None:
        """Give the bytes back; again is harmless. Memory returns when the last tensor or view of it is gone."""


class MemoryBuffer(Buffer):
    """A buffer in memory: ``data`` is a flat uint8 tensor, which owns the bytes or keeps their owner alive."""

    def __init__(self, data: torch.Tensor, tier: Tier, host_addressable: bool) -> None:
        super().__init__(data.numel(), tier)
        self._data: torch.Tensor | None = data
        self._host_addressable = host_addressable

    @property
    def data(self) -> torch.Tensor:
        """The flat uint8 tensor (nbytes,)."""
        if self._data is None:
            raise ValueError(f"the buffer of {self.nbytes} bytes was released")
        return self._data

    @property
    def host_addressable(self) -> bool:
        return self._host_addressable

    @property
    def host(self) -> memoryview:
        return self.data.numpy().data if self._host_addressable else super().host

    def tensor(self, dtype: torch.dtype, offset_bytes: int, shape: Sequence[int]) -> torch.Tensor:
        end = offset_bytes + math.prod(shape) * dtype.itemsize
        if not 0 <= offset_bytes <= end <= self.nbytes:
            raise ValueError(f"{dtype} {tuple(shape)} at byte {offset_bytes} exceeds the buffer's {self.nbytes} bytes")
        if offset_bytes % dtype.itemsize:
            raise ValueError(f"byte {offset_bytes} is not aligned to {dtype}, of {dtype.itemsize} bytes")
        return self.data[offset_bytes:end].view(dtype).view(tuple(shape))

    def touch(self) -> None:
        if self.data.device.type == "cpu":
            page_heads = self.data.numpy().data[:: mmap.PAGESIZE]
            page_heads[:] = bytes(page_heads)  # writing what was there faults the page in

    def release(self) -> None:
        self._data = None


class DiskBuffer(Buffer):
    """A buffer in the scratch file. Its space is reused after ``release`` or when the buffer is collected."""

    def __init__(self, scratch: Scratch, nbytes: int) -> None:
        super().__init__(nbytes, Tier.DISK)
        self._extent = scratch.allocate(nbytes)
        self._free = weakref.finalize(self, scratch.free, self._extent)

    @property
    def extent(self) -> Extent:
        """Where in the scratch file the bytes are."""
        if not self._free.alive:
            raise ValueError(f"the disk buffer of {self.nbytes} bytes was released")
        return self._extent

    def release(self) -> None:
        self._free()


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """``nbytes`` of page-aligned zeros (at least a page), resident only once touched.

    The mapping is private: shared anonymous memory would escape RLIMIT_DATA.

    Raises:
        DeviceOutOfMemory: the system or the process's limit refuses.
    """
    try:
        return mmap.mmap(-1, max(nbytes, 1), **_PRIVATE)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise DeviceOutOfMemory(nbytes, 0, None) from error
        raise


def host_buffer(nbytes: int, tier: Tier = Tier.HOST, host_addressable: bool = True) -> MemoryBuffer:
    """A buffer over ``anonymous_memory``."""
    return over(anonymous_memory(nbytes), nbytes, tier, host_addressable)


def over(memory: mmap.mmap, nbytes: int, tier: Tier, host_addressable: bool) -> MemoryBuffer:
    """A buffer over the first ``nbytes`` of ``memory``, which lives as long as any tensor or view of it."""
    import torch

    return MemoryBuffer(torch.frombuffer(memory, dtype=torch.uint8)[:nbytes], tier, host_addressable)
