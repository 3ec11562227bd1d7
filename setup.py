"""The kernels in C, and what a wheel leaves out; all else is in pyproject.toml.

A failed compilation leaves qvl to ggml's own kernels.
"""

import logging
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FLAGS = ["-O3", "-std=c11", "-fvisibility=hidden", "-fno-math-errno"]
NATIVE = "runtime/native"
# a file for each set of instructions, which compiles to nothing where the processor is of another kind
LEVELS = ("avx2", "avxvnni", "avx512vnni", "avx512bf16", "neon", "neoni8mm")
COMMON = (f"{NATIVE}/dispatch.c", f"{NATIVE}/backend.c")


class BuildExt(build_ext):
    """Compiles the kernels at the levels that the compiler knows."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":  # has no vector extensions: ggml's own kernels are used
            ext.extra_compile_args = ["/O2", "/std:c11"]
        elif ext.name.endswith("._kernels"):
            levels = [level for level in LEVELS if self._compiles(level)]
            if missing := [level for level in LEVELS if level not in levels]:
                self.announce(
                    f"qvl: the compiler lacks {', '.join(missing)}: left out", level=logging.WARNING
                )
            ext.sources = [*COMMON, *(f"{NATIVE}/{level}.c" for level in levels)]
            ext.define_macros = [(f"QVL_HAVE_{level.upper()}", None) for level in levels]
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Those that are marked in C; ctypes loads the libraries, which have no PyInit function."""
        return ext.export_symbols

    def _compiles(self, level: str) -> bool:
        command = [*self.compiler.compiler_so, *FLAGS, "-fsyntax-only", f"{NATIVE}/{level}.c"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class BuildPy(build_py):
    """The training of the embedded model is for those who work in the repository; the wheel has the model."""

    def run(self) -> None:
        if not self.editable_mode:
            self.packages = [name for name in self.packages if not name.startswith("qvl.models.nano")]
        super().run()


setup(
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    ext_modules=[
        Extension(
            "qvl.runtime.native._kernels",
            sources=list(COMMON),  # and the levels that compile
            depends=sorted(map(str, Path(NATIVE).glob("*.[ch]"))),
            extra_compile_args=[*FLAGS, "-ffp-contract=fast"],
            optional=True,
        ),
        Extension(
            "qvl.convert.native._kquants",
            sources=["convert/native/kquants.c"],
            depends=sorted(map(str, Path("convert/native").glob("*.h"))),
            # no fused multiply-add: the last bit is to be libggml's
            extra_compile_args=[*FLAGS, "-ffp-contract=off"],
            optional=True,
        ),
    ],
)
