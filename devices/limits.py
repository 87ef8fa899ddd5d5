"""A hard limit on the process's own memory, and the start-up that makes it hold. Imports no torch.

Linux bounds the private writable memory of a process by RLIMIT_DATA; allocations beyond it fail and torch
turns that into an error that can be caught. Elsewhere there is no such limit (``supported``): there a plan
and a ``meter.Monitor`` have to do.

The order at start-up: ``prepare_process``, import torch ``releasing_code``, allocate and touch buffers, run
every operation once and let one allocation fail (the code of the error path is file pages too), start the
monitor, ``set_data_limit(data_limit_for(budget, usage()))``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.abc
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from devices.meter import Usage

_MIB = 1 << 20

# glibc's malloc.h. Blocks from 64 KiB on are mapped and unmapped one by one, so that freed memory leaves
# the process and large requests are the ones that fail; small ones live off a reserve at the heap's top.
_MALLOPT = {
    "M_MMAP_THRESHOLD": (-3, 65536),
    "M_TOP_PAD": (-2, 4 * _MIB),
    "M_TRIM_THRESHOLD": (-1, 1 << 30),
}
# What fills a larger block takes long beside its page faults, and its hole would be large.
LARGEST_FROM_HEAP = 8 * _MIB
_FROM_HEAP = {"M_MMAP_THRESHOLD": (-3, LARGEST_FROM_HEAP), "M_MXFAST": (1, 0)}
# A mapping of a file in smaps, read and executed alone, with its fields.
_CODE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ (\S+ \S+) +/.*((?:\n[A-Z].*)*)", re.MULTILINE)
_NONE = re.compile(rb"^(?:Anonymous|Swap): +0 kB$", re.MULTILINE)
_noted_code: set[tuple[int, int, bytes]] = set()
_NO_CACHE = "glibc.malloc.tcache_count=0"
# Code that oneDNN has written for products of one shape, a MiB each; a step has some 30 in bf16, none in fp32.
_KEPT_PRIMITIVES = 64
_STACK_GROWTH_BYTES = _MIB // 2
# The last is oneDNN's, of code for a new shape; of a descriptor it would mean that there is no such operation.
_OUT_OF_MEMORY = re.compile("can't allocate memory|bad_alloc|out of memory|could not create a primitive(?! descriptor)")


def prepare_process(num_threads: int) -> dict[str, int]:
    """Set thread counts and the allocator's parameters; call before numpy or torch are imported.

    OpenBLAS gets one thread: torch does not compute with it, and each reserves 32 MiB.

    Returns:
        What took effect, by name. Environment variables are set for child processes in any case, but left
        out here if numpy or torch was imported before; allocator parameters where the C library has none.
    """
    applied = {}
    too_late = "numpy" in sys.modules or "torch" in sys.modules
    # Waiting threads sleep: on a busy machine spinning ones keep the others from the cores, up to eight times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), num_threads)
    others = {"OPENBLAS_NUM_THREADS": 1, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _KEPT_PRIMITIVES}
    for name, value in (threads | others).items():
        os.environ[name] = str(value)
        if not too_late:
            applied[name] = value
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return applied
    return applied | {name: value for name, (number, value) in _MALLOPT.items() if mallopt(number, value) == 1}


def without_block_cache(environment: Mapping[str, str]) -> dict[str, str] | None:
    """``environment`` for a process whose heap closes its holes; None if it is one already, or there is no such switch.

    glibc aligns a tensor's block by cutting remainders off its ends, and each thread caches small freed blocks. A
    remainder in the cache keeps the block from growing together again: it is then too small for the next tensor of
    its size, and the heap grows to three times what is in use. The switch works at the start of a process only.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if not supported() or "glibc.malloc.tcache_count=" in tunables:
        return None
    return {**environment, "GLIBC_TUNABLES": f"{tunables}:{_NO_CACHE}" if tunables else _NO_CACHE}


def keep_freed_memory(keeps: bool) -> None:
    """Whether blocks of up to 8 MiB come from the heap, where what was freed is used again, or are mapped one by one
    as ``prepare_process`` has it.

    Mapping costs a fifth of a training step in page faults. But a heap has holes, most where small blocks that stay
    come between large ones that do not.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no such call
        for number, value in (_FROM_HEAP if keeps else {"M_MMAP_THRESHOLD": _MALLOPT["M_MMAP_THRESHOLD"]}).values():
            ctypes.CDLL(None).mallopt(number, value)


def return_freed_memory() -> None:
    """Give the heap's free pages back to the system, where the C library can.

    For use after an allocation failed: where no more can be mapped, malloc takes from the heap instead, which
    ``prepare_process`` lets never shrink by itself.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # as above
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def releasing_code() -> Iterator[None]:
    """``release_code`` for an import of torch inside: once its libraries are loaded, before its own modules take as
    much memory again, and at the end. No other thread may load or unload libraries meanwhile."""
    halfway = _Halfway()
    sys.meta_path.insert(0, halfway)
    try:
        yield
    finally:
        sys.meta_path.remove(halfway)
        release_code(noting=True)


class _Halfway(importlib.abc.MetaPathFinder):
    """Finds nothing, but is asked for the first module that torch imports after its libraries."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch._tensor":
            release_code(noting=True)


def release_code(noting: bool = False) -> None:
    """Lets go of the pages of machine code that are resident: what still runs comes back at its next use.

    Importing torch runs 60 MiB of code that never runs again, and it counts as resident. Of mappings that only
    execute, and of which nothing was changed in memory, the file has every page; the system's cache keeps it, too.

    ``noting``: no other thread is loading or unloading libraries, and later calls are about the mappings that there
    are now. Others could be just being made, or unmade.
    """
    global _noted_code  # noqa: PLW0603
    try:
        madvise = ctypes.CDLL(None).madvise
        found = _CODE.findall(Path("/proc/self/smaps").read_bytes())
    except (AttributeError, OSError, TypeError):  # not Linux
        return
    unchanged = {
        (int(start, 16), int(end, 16), file) for start, end, file, fields in found if len(_NONE.findall(fields)) == 2
    }
    if noting:
        _noted_code = unchanged
    for start, end, _ in unchanged & _noted_code:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def supported() -> bool:
    """Whether this system can limit the process's memory."""
    return sys.platform == "linux"


def set_data_limit(nbytes: int) -> None:
    """Let the process's private writable memory (VmData) not grow beyond ``nbytes``.

    Less than is in use now is allowed: then every further allocation fails.

    Raises:
        OSError: this system has no such limit.
        ValueError: negative, or above the hard limit that the process was started with.
    """
    if not supported():
        raise OSError(errno.ENOSYS, f"no limit on a process's memory on {sys.platform}")
    import resource

    if nbytes < 0:
        raise ValueError(f"a data limit of {nbytes} bytes")
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def lift_data_limit() -> None:
    """Back to the hard limit, usually none."""
    if supported():
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def data_limit_for(budget_bytes: int, usage: Usage, file_margin_bytes: int = 8 * _MIB) -> int:
    """The data limit that keeps the resident memory of a process in state ``usage`` within ``budget_bytes``.

    Resident = anonymous + file-backed + shared pages, and the limit bounds only the address space that
    anonymous pages can appear in. So from the budget are taken:
    file-backed and shared pages as they are, with a margin for library pages yet to be read in; and the
    stack, which the limit does not cover, with half a MiB to grow. Added is the address space that is
    reserved and not resident (VmData - RssAnon - swap: thread stacks, OpenBLAS' work area), because the
    limit counts it and it costs nothing. That holds only as long as it stays untouched: touch what will be
    used (``Buffer.touch``, a warm-up of every operation) before measuring ``usage``.

    Returns:
        Bytes. ``data_limit_for(...) - usage.data_bytes`` is what can still be allocated; refuse to go on if
        that is not enough. It can be negative.
    """
    outside_data = usage.file_bytes + usage.shared_bytes + file_margin_bytes + usage.stack_bytes + _STACK_GROWTH_BYTES
    untouched = usage.data_bytes - usage.anonymous_bytes - usage.swapped_bytes
    return budget_bytes - outside_data + untouched


@contextlib.contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    """Lets pass what ``is_out_of_memory``, and nothing else."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: Python's, the system's, a device's, or torch's on any device."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
