"""What every device must do. ``CONTRACT`` lists the checks; each takes a freshly opened device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from devices import Buffer, Device, DeviceOutOfMemory, Tier

MIB = 1 << 20
CHUNK = 4 * MIB


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes without a period that a misplaced copy could hide in."""
    return (
        torch.randint(0, 255, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        .numpy()
        .tobytes()
    )


def scratch_bytes(device: Device) -> int:
    """Length of the scratch file."""
    assert device._scratch is not None
    return device._scratch.file_bytes


def put(device: Device, buffer: Buffer, content: bytes, offset: int = 0) -> None:
    position = 0

    def write(view: memoryview) -> None:
        nonlocal position
        view[:] = content[position : position + len(view)]
        position += len(view)

    device.fill(buffer, offset, len(content), write)
    assert position == len(content)


def get(device: Device, buffer: Buffer, nbytes: int | None = None, offset: int = 0) -> bytes:
    parts: list[bytes] = []
    device.drain(
        buffer, offset, buffer.nbytes - offset if nbytes is None else nbytes, lambda view: parts.append(bytes(view))
    )
    return b"".join(parts)


def accounting_follows_buffers(device: Device) -> None:
    before = device.allocated_bytes()
    first, second = device.buffer(3 * MIB, Tier.DEVICE), device.buffer(2 * MIB, Tier.DEVICE)
    host = device.buffer(8 * MIB, Tier.HOST)
    assert before + 5 * MIB <= device.allocated_bytes() < before + 8 * MIB
    assert device.peak_bytes() >= device.allocated_bytes()
    first.release()
    first.release()
    assert before + 2 * MIB <= device.allocated_bytes() < before + 5 * MIB
    second.release()
    host.release()
    assert device.allocated_bytes() == before
    assert device.peak_bytes() >= before + 5 * MIB


def accounting_follows_tensors(device: Device) -> None:
    before = device.allocated_bytes()
    buffer = device.buffer(MIB, Tier.DEVICE)
    view = buffer.tensor(torch.float32, 0, (16,))[3:5]
    buffer.release()
    assert device.allocated_bytes() >= before + MIB
    view.fill_(1)
    del view
    assert device.allocated_bytes() == before


def cap_is_a_limit(device: Device) -> None:
    base = device.peak_bytes()  # on a GPU the context counts
    device.set_cap(base + 64 * MIB)
    small = device.buffer(MIB, Tier.DEVICE)
    with pytest.raises(DeviceOutOfMemory, match=str(256 * MIB)) as caught:
        device.buffer(256 * MIB, Tier.DEVICE)
    assert caught.value.requested == 256 * MIB
    assert caught.value.cap == base + 64 * MIB
    assert caught.value.in_use >= MIB
    again = device.buffer(MIB, Tier.DEVICE)
    assert device.peak_bytes() <= base + 64 * MIB
    device.set_cap(None)
    large = device.buffer(256 * MIB, Tier.DEVICE)
    for buffer in (small, again, large):
        buffer.release()


def new_cap_starts_a_new_peak(device: Device) -> None:
    device.buffer(64 * MIB, Tier.DEVICE).release()
    high = device.peak_bytes()
    device.set_cap(None)
    assert device.peak_bytes() <= high - 64 * MIB


def cap_counts_restored_tensors(device: Device) -> None:
    base = device.peak_bytes()
    offloaded = device.offload(torch.ones(8 * MIB, dtype=torch.uint8, device=device.torch_device), Tier.HOST)
    device.set_cap(base + 72 * MIB)
    restored: list[torch.Tensor] = []
    with pytest.raises(DeviceOutOfMemory):
        while len(restored) < 20:
            restored.append(offloaded.restore())
    assert 2 <= len(restored) <= 9
    restored.pop()
    restored.append(offloaded.restore())
    device.set_cap(None)  # comparing takes memory too
    assert all(bool((tensor == 1).all()) for tensor in restored)


def tensors_share_bytes(device: Device) -> None:
    for tier in (Tier.DEVICE, Tier.HOST):
        buffer = device.buffer(4096, tier)
        put(device, buffer, bytes(4096))
        whole = buffer.tensor(torch.uint8, 0, (4096,))
        part = buffer.tensor(torch.int32, 8, (2, 3))
        part.copy_(torch.arange(6).reshape(2, 3))
        device.synchronize()
        assert whole[8:32].cpu().view(torch.int32).tolist() == [0, 1, 2, 3, 4, 5]
        assert get(device, buffer, 24, 8) == torch.arange(6, dtype=torch.int32).numpy().tobytes()
        assert buffer.tensor(torch.float32, 4096, (0, 3)).shape == (0, 3)
        assert buffer.tensor(torch.float32, 0, ()).shape == ()
        for dtype, offset, shape in ((torch.float32, 2, (1,)), (torch.uint8, 1, (4096,)), (torch.uint8, -1, (1,))):
            with pytest.raises(ValueError, match=r"exceeds|aligned"):
                buffer.tensor(dtype, offset, shape)


def bases_are_page_aligned(device: Device) -> None:
    for tier, nbytes in itertools.product((Tier.DEVICE, Tier.HOST), (1, 5000, MIB)):
        buffer = device.buffer(nbytes, tier)
        alignment = 512 if device.torch_device.type == "cuda" else 4096  # pinned memory is the driver's
        assert buffer.tensor(torch.uint8, 0, (nbytes,)).data_ptr() % alignment == 0


def touch_keeps_content(device: Device) -> None:
    buffer = device.buffer(3 * 4096 + 5, Tier.HOST)
    content = pattern(buffer.nbytes)
    put(device, buffer, content)
    buffer.touch()
    assert get(device, buffer) == content


def host_view_where_addressable(device: Device) -> None:
    addressable = {
        Tier.DEVICE: device.capabilities.host_addressable,
        Tier.HOST: True,
        Tier.DISK: False,
    }
    for tier, expected in addressable.items():
        buffer = device.buffer(100, tier)
        assert (buffer.tier, buffer.nbytes, buffer.host_addressable) == (tier, 100, expected)
        if expected:
            buffer.host[7] = 42
            assert buffer.tensor(torch.uint8, 0, (100,))[7] == 42
        else:
            with pytest.raises(ValueError, match="cannot address"):
                _ = buffer.host


def released_buffers_refuse(device: Device) -> None:
    intact = device.buffer(16, Tier.HOST)
    for tier in Tier:
        buffer = device.buffer(16, tier)
        buffer.release()
        with pytest.raises(ValueError, match="released"):
            device.copy_async(buffer, intact).wait()
            device.synchronize()
    with pytest.raises(ValueError, match="-1"):
        device.buffer(-1, Tier.HOST)


def copies_are_exact(device: Device) -> None:
    """Between all pairs of tiers, with offsets, leaving every other byte alone."""
    for size, (source_tier, destination_tier) in itertools.product((1, 1000, CHUNK + 3), itertools.product(Tier, Tier)):
        source, destination = device.buffer(size + 11, source_tier), device.buffer(size + 29, destination_tier)
        content, before = pattern(size + 11, 1), pattern(size + 29, 2)
        put(device, source, content)
        put(device, destination, before)
        device.copy_async(source, destination, size, source_offset=7, destination_offset=13).wait()
        assert get(device, destination) == before[:13] + content[7 : 7 + size] + before[13 + size :]
        assert get(device, source) == content
        source.release()
        destination.release()


def copies_check_their_ranges(device: Device) -> None:
    small, large = device.buffer(10, Tier.HOST), device.buffer(20, Tier.DEVICE)
    device.copy_async(small, large).wait()
    device.copy_async(small, large, 0, 10, 20).wait()
    for arguments in (
        (large, small),
        (small, large, 11),
        (small, large, 5, 6),
        (small, large, 5, 0, 16),
        (small, large, -1),
    ):
        with pytest.raises(ValueError, match="exceed"):
            device.copy_async(*arguments)
    with pytest.raises(ValueError, match="overlap"):
        device.copy_async(large, large, 6, 0, 5)


def copies_run_in_order(device: Device) -> None:
    """A chain over every tier and one buffer reused, waited for at its end only."""
    size = 2 * MIB + 17
    contents = [pattern(size, seed) for seed in range(3)]
    sources = [device.buffer(size, Tier.HOST) for _ in contents]
    through, disk = device.buffer(size, Tier.DEVICE), device.buffer(3 * size, Tier.DISK)
    ends = [device.buffer(size, Tier.HOST) for _ in contents]
    for source, content in zip(sources, contents, strict=True):
        source.host[:] = content
    for index, source in enumerate(sources):
        device.copy_async(source, through)
        device.copy_async(through, disk, destination_offset=index * size)
    events = [device.copy_async(disk, end, size, index * size) for index, end in enumerate(ends)]
    events[-1].wait()
    assert [bytes(end.host) for end in ends] == contents


def computation_comes_before_copies(device: Device) -> None:
    buffer, host = device.buffer(4 * MIB, Tier.DEVICE), device.buffer(4 * MIB, Tier.HOST)
    values = buffer.tensor(torch.float32, 0, (MIB,))
    values.fill_(1)
    for _ in range(10):
        values.mul_(2)
    device.copy_async(buffer, host).wait()
    assert bool((host.tensor(torch.float32, 0, (MIB,)) == 1024).all())


def events_are_idempotent(device: Device) -> None:
    source, destination = device.buffer(MIB, Tier.HOST), device.buffer(MIB, Tier.DEVICE)
    event = device.copy_async(source, destination)
    for _ in range(3):
        event.wait()
        assert event.done()


def synchronize_completes_everything(device: Device) -> None:
    content = pattern(MIB)
    source, destination = device.buffer(MIB, Tier.HOST), device.buffer(MIB, Tier.DEVICE)
    back = device.buffer(MIB, Tier.HOST)
    source.host[:] = content
    first = device.copy_async(source, destination)
    second = device.copy_async(destination, back)
    device.synchronize()
    assert first.done()
    assert second.done()
    assert bytes(back.host) == content
    device.synchronize()


def fill_and_drain_round_trip(device: Device) -> None:
    for size, tier in itertools.product((0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5), Tier):
        buffer = device.buffer(size + 30, tier)
        around = pattern(size + 30, 3)
        put(device, buffer, around)
        put(device, buffer, pattern(size, 4), 9)
        assert get(device, buffer, size, 9) == pattern(size, 4)
        assert get(device, buffer) == around[:9] + pattern(size, 4) + around[9 + size :]
        lengths: list[int] = []
        device.drain(buffer, 9, size, lambda view, lengths=lengths: lengths.append(len(view)))
        if buffer.host_addressable:
            assert lengths == ([size] if size else [])
        else:
            assert lengths == [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
        buffer.release()


def fill_passes_errors_through(device: Device) -> None:
    buffer = device.buffer(CHUNK + 1, Tier.DEVICE)

    def fail(_: memoryview) -> None:
        raise OSError("no such sector")

    for move in (device.fill, device.drain):
        with pytest.raises(OSError, match="no such sector"):
            move(buffer, 0, CHUNK + 1, fail)
        with pytest.raises(ValueError, match="exceed"):
            move(buffer, 1, CHUNK + 1, fail)


def _tensors(device: Device) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(48, 40, generator=generator).to(device.torch_device)
    yield "contiguous", base
    yield "transposed", base.t()
    yield "gappy", base[3:40:5, 1:30:7]
    yield "expanded", base[:, :1].expand(48, 6)
    yield "channels last", base.reshape(2, 4, 6, 40).contiguous(memory_format=torch.channels_last)
    yield "requires gradient", base[1:].clone().requires_grad_()
    yield "bfloat16", base.to(torch.bfloat16)[1:]
    yield "bool", base[2:, 3:] > 0
    yield "int64", (base * 100).to(torch.int64).t()[5:]
    yield "not a number", torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45], device=device.torch_device)
    yield "empty", base[:0, 3:]
    yield "scalar", base[4, 5]
    yield "large", torch.randint(0, 255, (CHUNK + 77,), dtype=torch.uint8, generator=generator).to(device.torch_device)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def offloaded_tensors_come_back(device: Device) -> None:
    for (name, tensor), tier in itertools.product(_tensors(device), (Tier.HOST, Tier.DISK)):
        expected, shape, stride, dtype = _bits(tensor), tensor.shape, tensor.stride(), tensor.dtype
        offloaded = device.offload(tensor, tier)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if tensor.numel() else 0
        assert offloaded.nbytes == extent * dtype.itemsize, name
        if tensor.numel():
            tensor.detach().zero_()  # what comes back must not be the original
        for _ in range(2):
            restored = offloaded.restore()
            assert (restored.shape, restored.stride(), restored.dtype) == (shape, stride, dtype), name
            assert restored.device.type == device.torch_device.type, name
            assert _bits(restored) == expected, name
        offloaded.release()
        offloaded.release()
        if extent:
            assert _bits(restored) == expected, name
            with pytest.raises(ValueError, match="released"):
                offloaded.restore()


def offload_refuses(device: Device) -> None:
    tensor = torch.ones(3, device=device.torch_device)
    with pytest.raises(ValueError, match="host or disk"):
        device.offload(tensor, Tier.DEVICE)
    with pytest.raises(ValueError, match="layout"):
        device.offload(torch.eye(3, device=device.torch_device).to_sparse(), Tier.HOST)
    with pytest.raises(ValueError, match="meta"):
        device.offload(torch.ones(3, device="meta"), Tier.HOST)


def scratch_is_reused(device: Device) -> None:
    sizes = (3 * MIB, 100, 5000, 2 * MIB + 1, 0)
    lengths = []
    for _ in range(50):
        tensors = [torch.full((size,), 7, dtype=torch.uint8, device=device.torch_device) for size in sizes]
        kept = [device.offload(tensor, Tier.DISK) for tensor in tensors]
        for offloaded in reversed(kept):
            assert bool((offloaded.restore() == 7).all())
            offloaded.release()
        lengths.append(scratch_bytes(device))
    assert lengths == [lengths[0]] * 50
    assert sum(sizes) <= lengths[0] <= sum(sizes) + len(sizes) * 4096
    dropped = device.buffer(lengths[0], Tier.DISK)  # one range again, so neighbours were joined
    assert scratch_bytes(device) == lengths[0]
    del dropped
    device.buffer(lengths[0], Tier.DISK)
    assert scratch_bytes(device) == lengths[0]


def disk_buffers_do_not_share_space(device: Device) -> None:
    first, second, third = (device.buffer(5000, Tier.DISK) for _ in range(3))
    second.release()
    replacement, overflow = device.buffer(100, Tier.DISK), device.buffer(9000, Tier.DISK)
    contents = {
        buffer: pattern(buffer.nbytes, seed) for seed, buffer in enumerate((first, third, replacement, overflow))
    }
    for buffer, content in contents.items():
        put(device, buffer, content)
    for buffer, content in contents.items():
        assert get(device, buffer) == content


CONTRACT: tuple[Callable[[Device], None], ...] = (
    accounting_follows_buffers,
    accounting_follows_tensors,
    cap_is_a_limit,
    new_cap_starts_a_new_peak,
    cap_counts_restored_tensors,
    tensors_share_bytes,
    bases_are_page_aligned,
    touch_keeps_content,
    host_view_where_addressable,
    released_buffers_refuse,
    copies_are_exact,
    copies_check_their_ranges,
    copies_run_in_order,
    computation_comes_before_copies,
    events_are_idempotent,
    synchronize_completes_everything,
    fill_and_drain_round_trip,
    fill_passes_errors_through,
    offloaded_tensors_come_back,
    offload_refuses,
    scratch_is_reused,
    disk_buffers_do_not_share_space,
)
"""Each takes a freshly opened device with a scratch folder and asserts one part of the contract."""
