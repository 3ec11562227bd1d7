"""The kernels' C harness, compiled for ARM and run under emulation where a cross compiler and qemu exist."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATOR = "qemu-aarch64"
COMPILERS = {
    "gcc": ["aarch64-linux-gnu-gcc", "-static"],
    "clang": ["clang", "--target=aarch64-linux-gnu", "-static"],  # with gcc's headers and linker
}
LEVELS = ["neon", "neoni8mm"]
# by qemu's name of a processor: the levels that it has
PROCESSORS = {"max": ["neoni8mm", "neon"], "cortex-a76": ["neon"], "cortex-a53": []}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_neon_under_emulation(compiler: str, tmp_path: Path) -> None:
    programs = (COMPILERS[compiler][0], "aarch64-linux-gnu-gcc", EMULATOR)
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"NEON cannot be emulated here: {' and '.join(missing)} missing")
    program = tmp_path / "harness"
    native = ROOT / "runtime" / "native"
    sources = [*map(str, sorted(native.glob("*.c"))), str(Path(__file__).with_name("harness.c"))]
    flags = ["-O2", "-std=c11", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", f"-I{native}"]
    flags += [f"-DQVL_HAVE_{level.upper()}" for level in LEVELS]
    command = [*COMPILERS[compiler], *flags, *sources, "-lm", "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    for processor, expected in PROCESSORS.items():
        done = subprocess.run(
            [EMULATOR, "-cpu", processor, str(program), "10"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        ran = [line.partition(":")[0] for line in done.stdout.splitlines() if "10 cases" in line]
        assert ran == expected, f"{processor}: {done.stdout}{done.stderr}"
        assert done.returncode == (0 if expected else 1), done.stdout + done.stderr
