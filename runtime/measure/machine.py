"""The machine that something is measured on, as far as it bears on speed."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.devices import cpu_device, devices
from qvl.runtime.ggml.features import cpu_features
from qvl.runtime.native import kernels
from qvl.runtime.resources import default_threads

_NO_INSTRUCTIONS: Final = ("OPENMP", "REPACK", "LLAMAFILE", "KLEIDIAI", "ACCELERATE")


@dataclass(frozen=True)
class Machine:
    """A processor or device.

    Attributes:
        cores: physical ones that this process may use.
        instructions: sets that ggml was compiled to use.
        build: how else ggml was compiled.
        devices: beside the CPU.
        native: the level of qvl's own kernels (`qvl.runtime.native`); None where there are none.
        ggml: its version.
    """

    cpu: str
    system: str
    cores: int
    logical: int
    memory_bytes: int
    instructions: tuple[str, ...]
    build: tuple[str, ...]
    devices: tuple[str, ...]
    native: str | None
    ggml: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_machine() -> Machine:
    """This machine."""
    features = cpu_features()
    return Machine(
        cpu=_cpu_name(),
        system=f"{platform.system()} {platform.machine()}",
        cores=default_threads(),
        logical=os.cpu_count() or 1,
        memory_bytes=cpu_device().memory()[1],
        instructions=tuple(name for name in features if name not in _NO_INSTRUCTIONS),
        build=tuple(name for name in features if name in _NO_INSTRUCTIONS),
        devices=tuple(f"{d.name}: {d.description}" for d in devices() if not d.is_cpu),
        native=found.name if (found := kernels()) else None,
        ggml=_ggml_version(),
    )


def _ggml_version() -> str:
    function = getattr(ggml.lib().handles[0], "ggml_version", None)
    if function is None:
        return "unknown"
    function.restype = ctypes.c_char_p
    version: bytes = function()
    return version.decode()


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        try:
            text = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:
            text = ""
        for line in text.splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()
