from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from devices import DeviceOutOfMemory
from devices.limits import data_limit_for, is_out_of_memory, supported, without_block_cache
from devices.meter import Usage
from tests.devices.subprocesses import run_python

MIB = 1 << 20
_GLIBC = platform.libc_ver()[0] == "glibc"

linux_only = pytest.mark.skipif(not supported(), reason="no limit on a process's memory on this system")


def _run(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """What the code prints, as JSON, from a process of its own: limits and mallopt cannot be undone."""
    return json.loads(run_python(code, *arguments, env=env))


_FILL_UP = """
import json, sys
from devices.limits import *
from devices.meter import Monitor, usage
from resource import RLIMIT_DATA, getrlimit
budget = int(sys.argv[1])
excess = []
prepare_process(1)
import torch

def fill(size):
    tensors = []
    try:
        while len(tensors) < 100000:
            tensors.append(torch.ones(size, dtype=torch.uint8))
    except RuntimeError as error:
        assert is_out_of_memory(error), error
        return len(tensors) * size
    raise AssertionError("no limit")

def step():
    x = torch.randn(32, 64, requires_grad=True)
    layer = torch.nn.Linear(64, 64)
    (layer(x).relu() ** 2).sum().backward()

step()
try:
    torch.empty(1 << 50)
except RuntimeError:
    pass
monitor = Monitor(budget, lambda: excess.append(1))
monitor.start()
limit = data_limit_for(budget, usage())
set_data_limit(limit)
headroom = limit - usage().data_bytes
assert getrlimit(RLIMIT_DATA)[0] == limit
filled = [fill(size) for size in (1 << 20, 70000, 1 << 20, 5 << 20)]
step()
measured = usage()
lift_data_limit()
torch.ones(budget, dtype=torch.uint8)
monitor.stop()
print(json.dumps(dict(peak=measured.peak_bytes, filled=filled, headroom=headroom, excess=len(excess),
                      lifted=len(set(getrlimit(RLIMIT_DATA))) == 1, after=usage().peak_bytes)))
"""


@linux_only
@pytest.mark.parametrize("budget_mib", [330, 450])
def test_the_data_limit_keeps_a_process_within_its_budget(budget_mib: int) -> None:
    """... uses the budget up to 40 MiB, leaves the process alive, and freed memory can be had again."""
    budget = budget_mib * MIB
    result = _run(_FILL_UP, str(budget))
    assert budget - 40 * MIB < result["peak"] <= budget
    assert min(result["filled"]) > 0.8 * result["headroom"] > 10 * MIB
    assert result["lifted"]
    assert result["after"] > budget  # the same process outgrows it as soon as the limit is lifted ...
    assert result["excess"] == 1  # ... which the monitor saw, and never before


@linux_only
def test_buffers_fail_with_the_devices_error_at_the_limit() -> None:
    assert (
        _run(
            "import json, torch\n"
            "from devices import DeviceOutOfMemory, Tier, open_device\n"
            "from devices.limits import *\n"
            "from devices.meter import usage\n"
            "device = open_device('cpu')\n"
            "set_data_limit(usage().data_bytes + (20 << 20))\n"
            "results = []\n"
            "for tier in (Tier.DEVICE, Tier.HOST):\n"
            "    try:\n"
            "        device.buffer(64 << 20, tier)\n"
            "    except DeviceOutOfMemory as error:\n"
            "        results.append([error.requested, device.allocated_bytes()])\n"
            "device.buffer(4 << 20, Tier.DEVICE).touch()\n"
            "print(json.dumps(results))"
        )
        == [[64 * MIB, 0]] * 2
    )


@linux_only
def test_a_limit_can_be_below_what_is_in_use() -> None:
    assert _run(
        "import json\n"
        "from resource import RLIMIT_DATA, getrlimit\n"
        "from devices.limits import *\n"
        "set_data_limit(4096)\n"
        "try:\n"
        "    bytearray(1 << 24)\n"
        "except MemoryError as error:\n"
        "    lift_data_limit()\n"
        "    print(json.dumps([is_out_of_memory(error), len(bytearray(1 << 24)), len(set(getrlimit(RLIMIT_DATA)))]))"
    ) == [True, 1 << 24, 1]


@linux_only
def test_code_that_ran_once_leaves_memory_and_comes_back_when_it_runs() -> None:
    found = _run("""
import json
from devices.limits import prepare_process, release_code, releasing_code
from devices.meter import usage
prepare_process(1)
import torch
def values():
    x = torch.linspace(-1, 1, 4096).reshape(64, 64).requires_grad_()
    (torch.nn.functional.gelu(x @ x) ** 2).sum().backward()
    return x.grad.sum().item()
imported, first = usage(), values()
release_code()  # nothing was noted
assert usage().file_bytes >= imported.file_bytes
release_code(noting=True)
released, again = usage(), values()
try:
    torch.empty(1 << 50)
except RuntimeError as error:
    raised = str(error)
print(json.dumps([imported.file_bytes, released.file_bytes, usage().file_bytes, first, again, raised]))
""")
    imported, released, used, first, again, raised = found
    assert released < imported // 3
    assert used < imported // 2  # what these operations need, and no more
    assert again == first
    assert "allocate" in raised


@linux_only
def test_torch_is_imported_in_less_memory() -> None:
    peaks = [
        _run(f"""
import contextlib, json
from devices.limits import prepare_process, releasing_code
from devices.meter import usage
prepare_process(1)
with {how}:
    import torch
assert torch.ones(3).sum().item() == 3
print(json.dumps(usage().peak_bytes))
""")
        for how in ("releasing_code()", "contextlib.nullcontext()")
    ]
    assert peaks[0] < peaks[1] - 25 * MIB


@linux_only
def test_mappings_that_were_changed_in_memory_keep_their_pages() -> None:
    """Of relocated or patched code the file has not what is in memory."""
    assert (
        _run("""
import ctypes, json, mmap, tempfile
from devices.limits import release_code
with tempfile.NamedTemporaryFile() as file:
    file.write(bytes(mmap.PAGESIZE))
    file.flush()
    private = mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    private[:5] = b"patch"
    address = ctypes.addressof(ctypes.c_char.from_buffer(private))
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC) == 0
    release_code(noting=True)
    print(json.dumps(ctypes.string_at(address, 5).decode()))
""")
        == "patch"
    )


def test_the_limits_arithmetic() -> None:
    usage = Usage(
        peak_bytes=0,
        resident_bytes=205 * MIB,
        anonymous_bytes=120 * MIB,
        file_bytes=80 * MIB,
        shared_bytes=5 * MIB,
        data_bytes=170 * MIB,
        stack_bytes=MIB,
        swapped_bytes=10 * MIB,
    )
    expected = (300 - 80 - 5 - 16 - 1) * MIB - MIB // 2 + (170 - 120 - 10) * MIB
    assert data_limit_for(300 * MIB, usage, file_margin_bytes=16 * MIB) == expected
    assert data_limit_for(300 * MIB, usage) == expected + 8 * MIB
    assert data_limit_for(40 * MIB, usage) < 0


_PREPARE = """
import json, os, sys
if sys.argv[1] == "late":
    import numpy
from devices.limits import prepare_process
applied = prepare_process(2)
import torch
print(json.dumps([applied, os.environ["OMP_NUM_THREADS"], torch.get_num_threads()]))
"""


@linux_only
def test_prepare_process() -> None:
    applied, variable, num_threads = _run(_PREPARE, "early")
    assert applied["OMP_NUM_THREADS"] == applied["MKL_NUM_THREADS"] == 2
    assert applied["OPENBLAS_NUM_THREADS"] == 1
    mallopt = {name: value for name, value in applied.items() if name.startswith("M_")}
    expected = {"M_MMAP_THRESHOLD": 65536, "M_TOP_PAD": 4 * MIB, "M_TRIM_THRESHOLD": 1 << 30}
    assert mallopt == (expected if _GLIBC else {})
    assert (variable, num_threads) == ("2", 2)
    applied, variable, _ = _run(_PREPARE, "late")
    assert "OMP_NUM_THREADS" not in applied
    assert variable == "2"


_THRESHOLD = """
import json
import platform
from devices.limits import prepare_process
from devices.meter import usage
prepare_process(1)
blocks = [bytearray(b"x") * 100_000 for _ in range(300)]
full = usage().anonymous_bytes
keep = blocks[1::2] + [blocks[-1]]
del blocks
print(json.dumps(full - usage().anonymous_bytes))
"""


@pytest.mark.skipif(not _GLIBC, reason="another allocator")
def test_freed_blocks_leave_the_process() -> None:
    """Half of 30 MB freed in between the other half: returned by mmap's threshold, kept by a heap."""
    assert _run(_THRESHOLD) > 14_000_000


_SMALL_BLOCKS = """
import ctypes, json
from devices.limits import prepare_process, return_freed_memory
from devices.meter import usage
prepare_process(1)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = usage().resident_bytes
blocks = [c.malloc(1 << 15) for _ in range(1024)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 15)
for block in blocks:
    c.free(block)
freed = usage().resident_bytes - before
return_freed_memory()
print(json.dumps([freed, usage().resident_bytes - before]))
"""


@pytest.mark.skipif(not _GLIBC, reason="glibc's allocator")
def test_small_blocks_leave_the_process_when_told_to() -> None:
    freed, returned = _run(_SMALL_BLOCKS)
    assert freed > 24 * MIB
    assert returned < 4 * MIB


_WATCHED = """
import ctypes, json, time
from devices.limits import prepare_process
from devices.memory import HostMemory
prepare_process(1)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memory = HostMemory()
before = memory.resident_bytes()
blocks = [c.malloc(1 << 15) for _ in range(1024)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 15)
for block in blocks[:-1]:
    c.free(block)
kept = []
for planned in (before + (64 << 20), before + (16 << 20)):
    with memory.watch(1 << 40, lambda: None, planned):
        time.sleep(0.2)
    kept.append(memory.resident_bytes() - before)
print(json.dumps(kept))
"""


@pytest.mark.skipif(not _GLIBC, reason="glibc's allocator")
def test_what_was_freed_and_kept_goes_back_above_what_was_planned() -> None:
    below, above = _run(_WATCHED)
    assert below > 24 * MIB
    assert above < 8 * MIB


_HOLES = """
import json, random, sys
from devices.limits import keep_freed_memory, prepare_process
from devices.meter import usage
prepare_process(1)
import torch
keep_freed_memory(True)
chance = random.Random(0)
stays = []
torch.empty(1 << 24)
before = usage().resident_bytes
for _ in range(400):
    tensors = [torch.ones(chance.choice([49152, 147456, 393216])) for _ in range(8)]
    stays += [bytes(chance.randrange(600, 900)) for _ in range(4)]
    chance.shuffle(tensors)
    while tensors:
        del tensors[0]
print(json.dumps((usage().resident_bytes - before) / 2**20))
"""


@pytest.mark.skipif(not _GLIBC, reason="glibc's allocator")
def test_a_heap_without_the_cache_of_small_blocks_closes_its_holes() -> None:
    """Eight tensors at a time, 6 MiB on average and at most 12: with the cache what is freed does not fit the next."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    without = without_block_cache(environment)
    assert without is not None
    assert without_block_cache(without) is None
    grown = {name: _run(_HOLES, env=told) for name, told in (("with", environment), ("without", without))}
    assert grown["without"] < 20, grown
    assert grown["without"] < grown["with"], grown


def test_what_was_tuned_stays_tuned() -> None:
    told = without_block_cache({"GLIBC_TUNABLES": "glibc.malloc.check=0", "A": "b"})
    if supported():
        assert told == {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.tcache_count=0", "A": "b"}
    else:
        assert told is None


def test_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as torchs_own:
        torch.empty(1 << 50)
    assert is_out_of_memory(torchs_own.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(DeviceOutOfMemory(2, 1, 2))
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    for other in (RuntimeError("size mismatch"), OSError(28, "No space left on device"), ValueError("out of memory")):
        assert not is_out_of_memory(other)
