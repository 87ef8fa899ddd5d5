from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from devices import KINDS, Device, DeviceOutOfMemory, Tier, available, detect, open_device
from devices.emulated import EmulatedDevice
from devices.meter import usage
from devices.scratch import Scratch
from tests.devices.contracts import CONTRACT, MIB, get, pattern, scratch_bytes
from tests.devices.subprocesses import run_python

_KINDS = (
    "cpu",
    "emulated",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(kind: str, check: Callable[[Device], None], tmp_path: Path) -> None:
    device = open_device(kind, tmp_path)
    try:
        check(device)
    finally:
        device.set_cap(None)


@pytest.fixture
def emulated(tmp_path: Path) -> EmulatedDevice:
    return EmulatedDevice(tmp_path, memory_bytes=64 * MIB)


@pytest.mark.parametrize("source_tier", Tier)
@pytest.mark.parametrize("destination_tier", [Tier.DEVICE, Tier.HOST])
def test_a_copy_not_waited_for_shows_poison(
    emulated: EmulatedDevice, source_tier: Tier, destination_tier: Tier
) -> None:
    source, destination = emulated.buffer(4000, source_tier), emulated.buffer(6000, destination_tier)
    emulated.fill(source, 0, 4000, lambda view: view.__setitem__(slice(None), pattern(4000)))
    seen = destination.tensor(torch.uint8, 0, (6000,))
    seen.zero_()
    with emulated.hold():
        event = emulated.copy_async(source, destination, destination_offset=1000)
        assert not event.done()
        assert bool((seen[1000:5000] == 0xFF).all())
        assert bool(destination.tensor(torch.float32, 1000, (1000,)).isnan().all())
        assert not seen[:1000].any()
        assert not seen[5000:].any()
    event.wait()
    assert seen[1000:5000].numpy().tobytes() == pattern(4000)


def test_a_source_overwritten_before_the_copy_ran_shows(emulated: EmulatedDevice) -> None:
    source, destination = emulated.buffer(100, Tier.HOST), emulated.buffer(100, Tier.DEVICE)
    source.host[:] = bytes(100)
    with emulated.hold():
        event = emulated.copy_async(source, destination)
        source.host[:] = b"\x01" * 100
    event.wait()
    assert get(emulated, destination) == b"\x01" * 100


def test_poison_spares_what_an_earlier_copy_reads(emulated: EmulatedDevice) -> None:
    reused, out, replacement = (emulated.buffer(100, Tier.HOST) for _ in range(3))
    reused.host[:], replacement.host[:] = b"a" * 100, b"b" * 100
    with emulated.hold():
        emulated.copy_async(reused, out)
        last = emulated.copy_async(replacement, reused)
    last.wait()
    assert (bytes(out.host), bytes(reused.host)) == (b"a" * 100, b"b" * 100)


def test_an_emulated_device_has_the_memory_it_says(emulated: EmulatedDevice) -> None:
    assert emulated.profile().device_memory_bytes == 64 * MIB
    emulated.set_cap(1 << 40)
    with pytest.raises(DeviceOutOfMemory):
        emulated.buffer(64 * MIB + 1, Tier.DEVICE)
    emulated.buffer(64 * MIB, Tier.DEVICE)


_DISK_FULL = """
import resource, signal, sys
import torch
from pathlib import Path
from devices import Tier, open_device

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
device = open_device(sys.argv[1], Path(sys.argv[2]))
small, large = torch.ones(1000), torch.ones(1 << 20)
kept = device.offload(small, Tier.DISK)
room = device.buffer(4 << 20, Tier.DISK)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
source = device.buffer(4 << 20, Tier.HOST)
for attempt in (
    lambda: device.copy_async(source, room).wait(),
    lambda: device.offload(torch.ones(1 << 21), Tier.DISK),
):
    try:
        attempt()
    except OSError as error:
        print("refused", error.errno)
try:
    device.synchronize()
except OSError:
    print("reported")
device.synchronize()
assert torch.equal(kept.restore(), small)
"""


@pytest.mark.parametrize("kind", ["cpu", "emulated"])
def test_a_full_disk_is_reported(kind: str, tmp_path: Path) -> None:
    """The file's size limit stands in for the disk's: write and growth fail with EFBIG, the first write short."""
    output = run_python(_DISK_FULL, kind, str(tmp_path)).split("\n")
    assert output[:2] == ["refused 27", "refused 27"]
    assert ("reported" in output) == (kind == "emulated")  # copies within the call leave nothing to report


def test_a_short_read_is_reported(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    extent = scratch.allocate(10000)
    os.ftruncate(extent.descriptor, 6000)
    extent.read(memoryview(bytearray(6000)))
    with pytest.raises(OSError, match="4000 bytes too early"):
        extent.read(memoryview(bytearray(10000)))


def test_scratch_leaves_no_name_behind(tmp_path: Path) -> None:
    device = open_device("cpu", tmp_path)
    device.offload(torch.ones(1000), Tier.DISK)
    assert scratch_bytes(device) == 4096
    assert list(tmp_path.iterdir()) == []


def test_the_disk_tier_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scratch folder"):
        open_device("cpu").buffer(1, Tier.DISK)
    with pytest.raises(FileNotFoundError):
        open_device("cpu", tmp_path / "missing")


def test_buffers_are_resident_once_touched() -> None:
    device = open_device("cpu")
    before = usage()
    buffer = device.buffer(64 * MIB, Tier.DEVICE)
    reserved = usage()
    assert reserved.anonymous_bytes - before.anonymous_bytes < 2 * MIB
    assert reserved.data_bytes - before.data_bytes >= 64 * MIB  # private memory: a data limit counts it
    buffer.touch()
    assert usage().anonymous_bytes - before.anonymous_bytes >= 64 * MIB
    buffer.release()
    assert usage().anonymous_bytes - before.anonymous_bytes < 2 * MIB


def test_available_devices() -> None:
    profiles = available()
    assert profiles[-1].kind == "cpu"
    assert "emulated" not in [profile.kind for profile in profiles]
    assert profiles[-1].device_memory_bytes > MIB
    assert profiles[-1].to_json()["capabilities"]["host_addressable"] is True
    assert open_device().profile() == profiles[0]


def test_unknown_and_missing_devices() -> None:
    with pytest.raises(ValueError, match=r"tpu.*cpu"):
        open_device("tpu")
    for kind in set(KINDS) - {profile.kind for profile in available()} - {"emulated"}:
        with pytest.raises(RuntimeError, match=f"no {kind} device"):
            open_device(kind)


def test_a_kind_is_detected_by_itself() -> None:
    there = {profile.kind: profile for profile in available()}
    for kind in set(KINDS) - {"emulated"}:
        assert detect(kind) == there.get(kind)


def test_imports_stay_light() -> None:
    output = run_python(
        "import sys, devices, devices.limits, devices.meter, devices.scratch\n"
        "print([name for name in ('torch', 'numpy', 'psutil') if name in sys.modules])\n"
        "profiles = devices.available()\n"
        "print(len(profiles) > 1 or 'torch' not in sys.modules)"
    )
    assert output.split("\n")[:2] == ["[]", "True"]
