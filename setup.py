"""The kernels in C; all else is in pyproject.toml. A failed compilation leaves qvl to ggml's own kernels."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "qvl.runtime.native._kernels",
            sources=["runtime/native/attention.c", "runtime/native/linear.c"],
            depends=["runtime/native/simd.h", "runtime/native/ggml_abi.h"],
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden", "-fno-math-errno"],
            optional=True,
        )
    ]
)
