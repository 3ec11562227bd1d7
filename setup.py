"""The kernels in C, and what a wheel leaves out; all else is in pyproject.toml.

A failed compilation leaves qvl to ggml's own kernels.
"""

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

FLAGS = ["-O3", "-std=c11", "-fvisibility=hidden", "-fno-math-errno"]


class BuildPy(build_py):
    """The training of the embedded model is for those who work in the repository; the wheel has the model."""

    def run(self) -> None:
        if not self.editable_mode:
            self.packages = [name for name in self.packages if not name.startswith("qvl.models.nano")]
        super().run()


setup(
    cmdclass={"build_py": BuildPy},
    ext_modules=[
        Extension(
            "qvl.runtime.native._kernels",
            sources=["runtime/native/attention.c", "runtime/native/linear.c"],
            depends=["runtime/native/simd.h", "runtime/native/ggml_abi.h"],
            extra_compile_args=FLAGS,
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
