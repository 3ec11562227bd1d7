"""Installation with the compilers that are here: no warnings, and levels left out that one does not know."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvl.runtime.native import _Level

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtime" / "native"
X86 = ["avx512vnni", "avx512bf16", "avxvnni", "avx2"]
WRAPPER = """#!/bin/sh
# compiles at -O1, in less time; refuses what a compiler of another age would
for argument in "$@"; do
    case "$argument" in {refused}) echo "error: unknown target" >&2; exit 1 ;; esac
    shift
    [ "$argument" = -O3 ] && argument=-O1
    set -- "$@" "$argument"
done
exec {compiler} -Wall -Wextra -Werror "$@"
"""


def build(folder: Path, compiler: str, refused: str = "none") -> tuple[list[str], str]:
    """Names of the levels in the kernels that setup.py builds with a compiler, and what it prints."""
    wrapper = folder / "cc"
    wrapper.write_text(WRAPPER.format(compiler=compiler, refused=refused))
    wrapper.chmod(0o755)
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            f"--build-temp={folder}/o",
            f"--build-lib={folder}/lib",
        ],
        cwd=ROOT,
        env={**os.environ, "CC": str(wrapper)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (path,) = folder.glob("lib/qvl/runtime/native/_kernels*")
    lib = ctypes.CDLL(str(path))
    lib.qvl_level.restype = ctypes.POINTER(_Level)
    names, index = [], 0
    while level := lib.qvl_level(index):
        names.append(level.contents.name.decode())
        index += 1
    return names, done.stdout + done.stderr


@pytest.mark.skipif(os.name == "nt" or platform.machine() != "x86_64", reason="levels of x86, a shell script")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_level_compiles_without_warnings(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    names, said = build(tmp_path, compiler)
    assert sorted(names) == sorted(X86)
    assert "warning" not in said.lower() and "lacks" not in said


@pytest.mark.skipif(os.name == "nt" or platform.machine() != "x86_64", reason="levels of x86, a shell script")
def test_levels_that_the_compiler_lacks_are_left_out_and_named_once(tmp_path: Path) -> None:
    names, said = build(tmp_path, "cc", refused="*avx512bf16.c|*avxvnni.c")
    assert sorted(names) == ["avx2", "avx512vnni"]
    assert said.count("qvl: the compiler lacks avxvnni, avx512bf16") == 1
    assert "unknown target" not in said


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_compiler_that_knows_none_leaves_the_dispatcher(tmp_path: Path) -> None:
    assert build(tmp_path, "cc", refused="*avx*.c|*neon*.c")[0] == []
