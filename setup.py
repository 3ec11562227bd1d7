"""The kernels in C, and what a wheel leaves out; all else is in pyproject.toml.

A failed compilation leaves qvl to ggml's own kernels.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

FLAGS = ["-O3", "-std=c11", "-fvisibility=hidden", "-fno-math-errno"]
NATIVE = "runtime/native"
# one file for each set of instructions; where the processor is of another kind, the file compiles to nothing
LEVELS = {
    "x86": ("avx2", "avxvnni", "avx512vnni", "avx512bf16"),
    "arm": ("neon",),
}
HEADERS = ("attention", "blocks", "ggml_abi", "kernels", "lanes256", "lanes512", "level", "linear", "norm")


class BuildExt(build_ext):
    """Leaves out the kernels for instructions that the compiler does not know."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._kernels"):
            kind = "arm" if platform.machine().lower() in ("arm64", "aarch64") else "x86"
            levels = [level for level in LEVELS[kind] if self._compiles(ext, level)]
            ext.sources = [f"{NATIVE}/dispatch.c", *(f"{NATIVE}/{level}.c" for level in levels)]
            ext.define_macros = [(f"QVL_HAVE_{level.upper()}", None) for level in levels]
        super().build_extension(ext)

    def _compiles(self, ext: Extension, level: str) -> bool:
        try:
            self.compiler.compile(
                [f"{NATIVE}/{level}.c"], f"{self.build_temp}/probe", extra_postargs=["-fsyntax-only", *FLAGS]
            )
        except CompileError:
            self.announce(f"qvl: this compiler lacks {level}: its kernels are left out", level=3)
            return False
        return True


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
            sources=[f"{NATIVE}/dispatch.c"],  # and the levels that compile
            depends=[
                *(f"{NATIVE}/{name}.c" for levels in LEVELS.values() for name in levels),
                *(f"{NATIVE}/{name}.h" for name in (*HEADERS, "product", "vector", "weights")),
            ],
            extra_compile_args=[*FLAGS, "-ffp-contract=fast"],
            optional=True,
        ),
        Extension(
            "qvl.convert.native._kquants",
            sources=["convert/native/kquants.c"],
            depends=[f"convert/native/{name}.h" for name in ("lanes", "search", "pack")],
            # no fused multiply-add: the last bit is to be libggml's
            extra_compile_args=[*FLAGS, "-ffp-contract=off"],
            optional=True,
        ),
    ],
)
