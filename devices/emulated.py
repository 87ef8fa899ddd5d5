"""An accelerator with memory of its own, emulated on the CPU: what tests offloading where there is no GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from devices.base import Buffer, Event, Profile, Tier
from devices.buffers import MemoryBuffer
from devices.cpu import CpuDevice

if TYPE_CHECKING:
    import torch

_POISON = 0xFF
_MEMORY_BYTES = 1 << 30


class EmulatedDevice(CpuDevice):
    """Behaves like an accelerator of ``memory_bytes``, and punishes code that would fail on one.

    The host cannot address DEVICE buffers; the cap, at most ``memory_bytes``, counts them and restored
    activations as long as a tensor of them lives. Copies run in order on a thread of their own, and from
    the call until then a destination in memory holds 0xFF bytes (NaN as floats), so that a missing
    ``wait`` shows. Tensors are CPU tensors; what computing on them allocates is not counted.
    """

    kind = "emulated"

    def __init__(self, scratch: Path | None = None, memory_bytes: int = _MEMORY_BYTES) -> None:
        super().__init__(scratch)
        self._profile = dataclasses.replace(self._profile, device_memory_bytes=memory_bytes)
        self._cap = memory_bytes
        self._engine = CpuDevice()  # moves the bytes, as a copy engine does that sees both memories
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._pending: list[_Copy] = []  # unfinished copies, and failed ones until `synchronize`

    @classmethod
    def detect(cls) -> Profile | None:
        profile = super().detect()
        if profile is None:
            return None
        capabilities = dataclasses.replace(
            profile.capabilities, host_addressable=False, unified_memory=False, async_copies=True
        )
        return dataclasses.replace(
            profile,
            name=f"emulated on {profile.name}",
            device_memory_bytes=_MEMORY_BYTES,
            capabilities=capabilities,
        )

    def set_cap(self, nbytes: int | None) -> None:
        memory_bytes = self._profile.device_memory_bytes
        super().set_cap(memory_bytes if nbytes is None else min(nbytes, memory_bytes))

    def synchronize(self) -> None:
        pending, self._pending = self._pending, []
        for copy in pending:
            copy.future.exception()  # waits for all of them before one is reported
        for copy in pending:
            copy.wait()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let no copy run that is issued within; they run after. Waiting for one within never returns."""
        gate = threading.Event()
        self._worker.submit(gate.wait)
        try:
            yield
        finally:
            gate.set()

    def _copy(
        self, source: Buffer, source_offset: int, destination: Buffer, destination_offset: int, nbytes: int
    ) -> Event:
        self._pending = [copy for copy in self._pending if not copy.succeeded()]
        if isinstance(destination, MemoryBuffer):
            target = destination.data[destination_offset : destination_offset + nbytes]
            # An earlier copy that has yet to read this memory comes first, as on a stream. On disk no
            # poison is needed: it is read through this queue alone.
            if not any(copy.reads(target) for copy in self._pending):
                target.fill_(_POISON)
        read = source.data[source_offset : source_offset + nbytes] if isinstance(source, MemoryBuffer) else None
        arguments = (_exposed(source), source_offset, _exposed(destination), destination_offset, nbytes)
        copy = _Copy(self._worker.submit(self._engine._copy, *arguments), read)
        self._pending.append(copy)
        return copy


class _Copy(Event):
    """A queued copy and the memory it reads, if any: uint8 (nbytes,)."""

    def __init__(self, future: Future[Event], source: torch.Tensor | None) -> None:
        self.future = future
        self._source = source

    def wait(self) -> None:
        self.future.result()

    def done(self) -> bool:
        return self.future.done()

    def succeeded(self) -> bool:
        return self.future.done() and self.future.exception() is None

    def reads(self, memory: torch.Tensor) -> bool:
        """Whether the copy may still read some byte of ``memory`` (nbytes,)."""
        if self._source is None or self.done():
            return False
        start, other = self._source.data_ptr(), memory.data_ptr()
        return start < other + memory.numel() and other < start + self._source.numel()


def _exposed(buffer: Buffer) -> Buffer:
    """The buffer as the copy engine sees it."""
    return MemoryBuffer(buffer.data, Tier.HOST, host_addressable=True) if isinstance(buffer, MemoryBuffer) else buffer
