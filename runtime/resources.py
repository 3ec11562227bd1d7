"""The machine: cores and memory that this process may use."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from qvl.runtime.errors import BackendError

_UNKNOWN: Final = 2 << 30


def default_threads() -> int:
    """Physical cores that this process may use; more threads than cores slow ggml down."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, _physical_cores() or usable))


@lru_cache(maxsize=1)
def _physical_cores() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    pairs, package, core = set(), "", ""
    try:
        with open("/proc/cpuinfo") as f:  # noqa: PTH123
            for line in f:
                key, _, value = line.partition(":")
                if key.strip() == "physical id":
                    package = value.strip()
                elif key.strip() == "core id":
                    core = value.strip()
                    pairs.add((package, core))
    except OSError:
        return None
    return len(pairs) or None


def free_memory() -> int:
    """Bytes that new allocations may take without swapping.

    Linux and Windows say; elsewhere it is half of the memory, and 2 GB where not even that is known.
    """
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if sys.platform == "win32":
        return _windows_free_memory() or _UNKNOWN
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN


class _MemoryStatus(ctypes.Structure):
    """`MEMORYSTATUSEX` (sysinfoapi.h)."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _windows_free_memory() -> int:
    """Available physical memory by GlobalMemoryStatusEx; 0 if it fails."""
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    windll: Any = getattr(ctypes, "windll")  # noqa: B009 - there on Windows alone
    return int(status.ullAvailPhys) if windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0


def resident_bytes() -> int:
    """Memory of this process as it is; 100 MB, which is near it, where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 100_000_000


def peak_memory() -> int:
    """The most memory this process has had resident, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_address_space(n_bytes: int, what: str) -> None:
    """See that a limit on the address space (`ulimit -v`) leaves room: where it does not, ggml aborts.

    Raises:
        BackendError: it does not.
    """
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError, IndexError):  # no such limit, or it is not enforced
        return
    if limit != resource.RLIM_INFINITY and limit - used < n_bytes:
        raise BackendError(
            f"too little memory for {what}: this process's address space is limited to {limit >> 20} MB, "
            f"{max(limit - used, 0) >> 20} MB of it are free, and {n_bytes >> 20} MB are needed",
            hint="raise the limit (ulimit -v)",
        )
