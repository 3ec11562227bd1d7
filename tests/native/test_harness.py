"""The kernels' C harness, compiled for ARM and run under emulation where a cross compiler and qemu exist."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"NEON cannot be emulated here: {' and '.join(MISSING)} missing")
def test_neon_under_emulation(tmp_path: Path) -> None:
    program = tmp_path / "harness"
    native = ROOT / "runtime" / "native"
    sources = [*map(str, sorted(native.glob("*.c"))), str(Path(__file__).with_name("harness.c"))]
    flags = ["-O2", "-std=c11", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-static"]
    command = [COMPILER, *flags, "-DQVL_HAVE_NEON", f"-I{native}", *sources, "-lm", "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", str(program), "10"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: 10 cases of each kernel" in done.stdout
