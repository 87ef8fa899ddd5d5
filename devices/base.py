"""What a device is: three tiers of buffers, copies between them, a cap, and activations moved out and back.

The engine is written against this interface alone and never asks what kind of device it has.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from devices.buffers import Buffer, DeviceOutOfMemory, DiskBuffer, MemoryBuffer, Tier
from devices.memory import HostMemory, Memory
from devices.scratch import Scratch

if TYPE_CHECKING:
    import torch

__all__ = ["Buffer", "Capabilities", "Device", "DeviceOutOfMemory", "Event", "Offloaded", "Profile", "Tier"]

STAGING_BYTES = 4 << 20
"""Largest host buffer that ``fill`` and ``drain`` take to reach memory which the host cannot address."""


@dataclass(frozen=True)
class Capabilities:
    """What a device can do."""

    host_addressable: bool
    """The host reads and writes DEVICE buffers in place."""
    unified_memory: bool
    """Device and host share the same memory: a budget covers their sum."""
    enforces_cap: bool
    """``set_cap`` is a limit; where False it is only remembered."""
    pinned_host: bool
    """HOST buffers are page-locked."""
    async_copies: bool
    """Copies run beside computation."""
    bfloat16: bool
    """Computes in bfloat16."""


@dataclass(frozen=True)
class Profile:
    """A device as a plan needs it. ``num_cores`` counts the CPU cores that this process may use."""

    name: str
    kind: str
    device_memory_bytes: int
    host_memory_bytes: int
    num_cores: int
    capabilities: Capabilities

    def to_json(self) -> dict[str, Any]:
        """The fields, nested, as JSON takes them."""
        return dataclasses.asdict(self)


class Event(abc.ABC):
    """The end of one copy."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Block until the copy has run; then source and destination may be used and written freely. Idempotent.

        Raises:
            OSError: the copy failed to read or write the disk.
        """

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether ``wait`` would return at once."""


class CompletedEvent(Event):
    """A copy that ran within the call."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


class Device(abc.ABC):
    """One device. ``scratch`` is the folder of the disk tier's file; without it there is no disk tier.

    Raises:
        OSError: the scratch folder is missing or not writable.
        RuntimeError: this machine has no such device.
    """

    kind: ClassVar[str]

    def __init__(self, scratch: Path | None = None) -> None:
        profile = self.detect()
        if profile is None:
            raise RuntimeError(f"this machine has no {self.kind} device that torch can use")
        self._profile = profile
        self._scratch = Scratch(scratch) if scratch is not None else None

    @classmethod
    @abc.abstractmethod
    def detect(cls) -> Profile | None:
        """The profile of this machine's device of this kind, None if it has none; then torch is not imported."""

    @property
    @abc.abstractmethod
    def torch_device(self) -> torch.device:
        """Where the tensors of DEVICE buffers are."""

    @property
    def capabilities(self) -> Capabilities:
        """What this device can do."""
        return self._profile.capabilities

    def profile(self) -> Profile:
        """Name, sizes and capabilities."""
        return self._profile

    @cached_property
    def memory(self) -> Memory:
        """What a budget for work on this device is about: the process's memory, unless the device has its own."""
        return HostMemory()

    @abc.abstractmethod
    def set_cap(self, nbytes: int | None) -> None:
        """Limit the device tier to ``nbytes``, or lift the limit, and start the peak anew.

        More than the cap may be in use at the call; only further allocations fail.
        """

    @abc.abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes of the device tier in use. Released memory counts until its last tensor is gone."""

    @abc.abstractmethod
    def peak_bytes(self) -> int:
        """Most bytes of device memory used since the cap was set, or since the device was opened."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait for all copies and computation.

        Raises:
            OSError: a copy since the last call failed, whether or not its event was waited for.
        """

    @abc.abstractmethod
    def _allocate(self, nbytes: int, tier: Tier) -> MemoryBuffer:
        """A buffer of the DEVICE or HOST tier."""

    @abc.abstractmethod
    def _copy(
        self, source: Buffer, source_offset: int, destination: Buffer, destination_offset: int, nbytes: int
    ) -> Event:
        """``copy_async`` after its checks; ``nbytes`` is positive."""

    def buffer(self, nbytes: int, tier: Tier) -> Buffer:
        """A new buffer, aligned to a page (CUDA: to 512 bytes); its content is undefined and its pages untouched.

        Raises:
            DeviceOutOfMemory: the cap or the memory does not hold it.
            OSError: the scratch file cannot grow.
            ValueError: a negative size, or the DISK tier of a device opened without a scratch folder.
        """
        if nbytes < 0:
            raise ValueError(f"a buffer of {nbytes} bytes")
        if tier is not Tier.DISK:
            return self._allocate(nbytes, tier)
        if self._scratch is None:
            raise ValueError("the disk tier needs a device opened with a scratch folder")
        return DiskBuffer(self._scratch, nbytes)

    def copy_async(
        self,
        source: Buffer,
        destination: Buffer,
        nbytes: int | None = None,
        source_offset: int = 0,
        destination_offset: int = 0,
    ) -> Event:
        """Start to copy ``nbytes`` bytes (None: all of the source from its offset on) between any two tiers.

        Copies take effect in the order of their calls, after the computation issued before. Until the
        event was waited for, the destination's content is undefined, the source must not be written and
        neither may be released.

        Raises:
            ValueError: a range exceeds its buffer, or two ranges of one buffer overlap.
        """
        if nbytes is None:
            nbytes = source.nbytes - source_offset
        for buffer, offset in ((source, source_offset), (destination, destination_offset)):
            _check_range(buffer, offset, nbytes)
        if source is destination and abs(source_offset - destination_offset) < nbytes:
            raise ValueError(f"{nbytes} bytes at {source_offset} and {destination_offset} of one buffer overlap")
        if nbytes == 0:
            return CompletedEvent()
        return self._copy(source, source_offset, destination, destination_offset, nbytes)

    def fill(self, buffer: Buffer, offset: int, nbytes: int, write: Callable[[memoryview], None]) -> None:
        """Have ``write`` produce ``nbytes`` bytes of ``buffer`` from ``offset`` on.

        ``write`` gets writable views whose lengths add up to ``nbytes``, in order, and must fill each: one
        view of the memory itself where the host can address it, else chunks of at most 4 MiB. Returns when
        the bytes are there. The views are valid during the call only.

        Raises:
            ValueError: the range exceeds the buffer. Whatever ``write`` raises passes through.
        """
        _check_range(buffer, offset, nbytes)
        if nbytes == 0:
            return
        if buffer.host_addressable:
            write(buffer.host[offset : offset + nbytes])
            return
        staging = self.buffer(min(nbytes, STAGING_BYTES), Tier.HOST)
        try:
            for start in range(0, nbytes, STAGING_BYTES):
                count = min(STAGING_BYTES, nbytes - start)
                write(staging.host[:count])
                self.copy_async(staging, buffer, count, 0, offset + start).wait()
        finally:
            staging.release()

    def drain(self, buffer: Buffer, offset: int, nbytes: int, read: Callable[[memoryview], None]) -> None:
        """Have ``read`` consume ``nbytes`` bytes of ``buffer`` from ``offset`` on: ``fill`` the other way.

        Raises:
            ValueError: the range exceeds the buffer. Whatever ``read`` raises passes through.
        """
        _check_range(buffer, offset, nbytes)
        if nbytes == 0:
            return
        if buffer.host_addressable:
            read(buffer.host[offset : offset + nbytes])
            return
        staging = self.buffer(min(nbytes, STAGING_BYTES), Tier.HOST)
        try:
            for start in range(0, nbytes, STAGING_BYTES):
                count = min(STAGING_BYTES, nbytes - start)
                self.copy_async(buffer, staging, count, offset + start, 0).wait()
                read(staging.host[:count])
        finally:
            staging.release()

    def offload(self, tensor: torch.Tensor, tier: Tier) -> Offloaded:
        """Copy a tensor of this device out to the HOST or DISK tier; the caller then drops the tensor.

        What is copied is the storage from the tensor's first to its last element, so that strides,
        and with them the results of any kernel, come back as they were.

        Raises:
            ValueError: the tensor is not a strided tensor of this device, or the tier is DEVICE.
            OSError: the disk is full or failed.
        """
        if tier is Tier.DEVICE:
            raise ValueError("a tensor is offloaded to the host or disk tier")
        if tensor.device.type != self.torch_device.type:
            raise ValueError(f"a tensor on {tensor.device} cannot be offloaded from {self.torch_device}")
        data = _extent(tensor)
        source = MemoryBuffer(data, Tier.DEVICE, host_addressable=False)
        held = self.buffer(source.nbytes, tier)
        try:
            self.copy_async(source, held).wait()
        except BaseException:
            held.release()
            raise
        return Offloaded(self, held, tensor)

    def _copy_through_disk(
        self, source: Buffer, source_offset: int, destination: Buffer, destination_offset: int, nbytes: int
    ) -> None:
        """A copy from or to the DISK tier, run here and now, staged where the host cannot address the other end."""
        position = source_offset if isinstance(source, DiskBuffer) else destination_offset

        def advance(move: Callable[[memoryview, int], None]) -> Callable[[memoryview], None]:
            def step(view: memoryview) -> None:
                nonlocal position
                move(view, position)
                position += len(view)

            return step

        if isinstance(source, DiskBuffer):
            self.fill(destination, destination_offset, nbytes, advance(source.extent.read))
        elif isinstance(destination, DiskBuffer):
            self.drain(source, source_offset, nbytes, advance(destination.extent.write))


class Offloaded:
    """A tensor's bytes in the host or disk tier, ``nbytes`` of them."""

    def __init__(self, device: Device, held: Buffer, tensor: torch.Tensor) -> None:
        self.nbytes = held.nbytes
        self._device = device
        self._held = held
        self._dtype, self._shape, self._stride = tensor.dtype, tensor.shape, tensor.stride()

    def restore(self) -> torch.Tensor:
        """A new tensor on the device, equal in shape, strides, dtype and every bit; can be called again.

        Raises:
            DeviceOutOfMemory: the device's cap or memory does not hold it.
            OSError: the disk failed.
            ValueError: it was released.
        """
        memory = self._device.buffer(self.nbytes, Tier.DEVICE)
        try:
            self._device.copy_async(self._held, memory).wait()
            flat = memory.tensor(self._dtype, 0, (self.nbytes // self._dtype.itemsize,))
            return flat.as_strided(self._shape, self._stride)
        finally:
            memory.release()  # from here on the tensor alone keeps the memory

    def release(self) -> None:
        """Give the bytes in the tier back; restored tensors stay."""
        self._held.release()


def _extent(tensor: torch.Tensor) -> torch.Tensor:
    """The storage under ``tensor``, first element to last, as a flat uint8 tensor (extent_bytes,)."""
    import torch

    if tensor.layout is not torch.strided:
        raise ValueError(f"a tensor of layout {tensor.layout} has no extent in memory")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    num_elements = last + 1 if tensor.numel() else 0
    return tensor.detach().as_strided((num_elements,), (1,)).view(torch.uint8)


def _check_range(buffer: Buffer, offset: int, nbytes: int) -> None:
    if not 0 <= offset <= offset + nbytes <= buffer.nbytes:
        raise ValueError(f"{nbytes} bytes at {offset} exceed the buffer's {buffer.nbytes} bytes")
