from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from devices.meter import Monitor, Relief, TreeMeter, resident_bytes_fast, usage
from tests.devices.subprocesses import run_python

MIB = 1 << 20

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _resident(nbytes: int, flags: int = mmap.MAP_PRIVATE) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=flags | mmap.MAP_ANONYMOUS)
    memory[:] = b"\x01" * nbytes
    return memory


def _eventually(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@linux_only
def test_usage_follows_each_kind_of_memory() -> None:
    before = usage()
    private = _resident(40 * MIB)
    with_private = usage()
    assert 40 * MIB <= with_private.anonymous_bytes - before.anonymous_bytes < 90 * MIB
    assert with_private.data_bytes - before.data_bytes >= 40 * MIB
    assert with_private.peak_bytes >= with_private.resident_bytes >= before.resident_bytes + 38 * MIB
    private.close()
    assert usage().anonymous_bytes < with_private.anonymous_bytes - 38 * MIB
    shared = _resident(40 * MIB, mmap.MAP_SHARED)
    with_shared = usage()
    assert with_shared.shared_bytes - before.shared_bytes >= 39 * MIB
    assert with_shared.peak_bytes >= with_private.resident_bytes
    shared.close()
    parts = with_shared.anonymous_bytes + with_shared.file_bytes + with_shared.shared_bytes
    assert parts == with_shared.resident_bytes
    assert with_shared.stack_bytes > 0


def test_usage_agrees_with_the_system() -> None:
    assert usage().resident_bytes == pytest.approx(psutil.Process().memory_info().rss, abs=2 * MIB)
    assert usage(os.getpid()).resident_bytes == pytest.approx(usage().resident_bytes, abs=2 * MIB)


def test_usage_of_a_process_that_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert _eventually(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(ProcessLookupError):
        usage(child.pid)
    child.wait()
    with pytest.raises(ProcessLookupError):
        usage(child.pid)


@linux_only
def test_the_fast_reading_agrees() -> None:
    resident, file_backed = resident_bytes_fast()
    slow = usage()
    assert resident == pytest.approx(slow.resident_bytes, abs=2 * MIB)
    assert file_backed == pytest.approx(slow.file_bytes + slow.shared_bytes, abs=2 * MIB)
    start = time.perf_counter()
    for _ in range(1000):
        resident_bytes_fast()
    assert time.perf_counter() - start < 0.1  # 2 us each; reading the status file takes 50


@linux_only
def test_the_fast_reading_is_the_childs_own_after_a_fork() -> None:
    resident_bytes_fast()
    code = (
        "import mmap, os\n"
        "from devices.meter import resident_bytes_fast\n"
        "before, _ = resident_bytes_fast()\n"
        "if (pid := os.fork()) == 0:\n"
        "    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "    memory[:] = bytes(64 << 20)\n"
        "    os._exit(0 if resident_bytes_fast()[0] > 60 << 20 else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    run_python(code)


def test_the_monitor_reports_an_excess_once() -> None:
    calls: list[str] = []
    resident, _ = resident_bytes_fast()
    with Monitor(resident + 32 * MIB, lambda: calls.append(threading.current_thread().name)) as monitor:
        time.sleep(0.05)
        assert calls == []
        memory = _resident(64 * MIB)
        assert _eventually(lambda: bool(calls))
        time.sleep(0.05)
        memory.close()
        memory = _resident(64 * MIB)
        time.sleep(0.05)
        memory.close()
    assert calls == ["Monitor"]
    assert resident + 60 * MIB < monitor.peak_bytes < resident + 256 * MIB


def test_the_monitor_has_memory_relieved_before_the_budget_is_exceeded() -> None:
    held: list[object] = []
    excess: list[int] = []

    def relieve() -> None:
        while held:
            held.pop().close()  # type: ignore[attr-defined]

    budget = resident_bytes_fast()[0] + 64 * MIB
    with Monitor(budget, lambda: excess.append(1), relief=[Relief(budget - 4 * MIB, relieve, 0.5)]):
        time.sleep(0.05)
        held.append(_resident(32 * MIB))
        time.sleep(0.05)
        assert len(held) == 1
        held.append(_resident(30 * MIB))
        assert _eventually(lambda: not held)
    assert excess == []


def test_a_stopped_monitor_sees_nothing() -> None:
    calls: list[int] = []
    monitor = Monitor(resident_bytes_fast()[0] + 32 * MIB, lambda: calls.append(1))
    monitor.start()
    monitor.stop()
    monitor.stop()
    with_more = _resident(64 * MIB)
    time.sleep(0.05)
    with_more.close()
    assert calls == []


def test_a_monitor_may_be_stopped_by_its_callback() -> None:
    stopped = threading.Event()

    def on_excess() -> None:
        monitor.stop()
        stopped.set()

    monitor = Monitor(resident_bytes_fast()[0] + 32 * MIB, on_excess)
    monitor.start()
    memory = _resident(64 * MIB)
    assert stopped.wait(10)
    memory.close()
    monitor.stop()


def test_the_tree_meter_sums_children() -> None:
    hold = "import sys; data = bytearray(b'x') * (64 << 20); print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with TreeMeter(process.pid) as meter:
            process.stdout.readline()
            assert _eventually(lambda: meter.peak_bytes > 64 * MIB)
            time.sleep(0.1)
            process.stdin.close()
            process.wait()
    assert len(meter.high_water_bytes) >= 2
    assert meter.high_water_bytes[process.pid] < 64 * MIB < max(meter.high_water_bytes.values())
    assert meter.peak_bytes > max(meter.high_water_bytes.values())
