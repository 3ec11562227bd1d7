# ruff: noqa: E501
"""libggml through ctypes: the one place where its C functions are declared.

The shared libraries are those inside the llama-cpp-python package, found without importing it. Every
function is declared by its C prototype as it stands in ggml's headers (ggml.h, ggml-alloc.h,
ggml-backend.h, ggml-cpu.h, gguf.h), and the prototype is what the argument types are made from:
pointers become `c_void_p`, `const char *` becomes `c_char_p`, enums `c_int`.

    >>> from qvl.runtime.ggml import library as ggml
    >>> ggml.lib().ggml_row_size(ggml.Type.Q4_K, 256)
    144

A failed assertion in ggml aborts the process: callers check types, shapes and sizes first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from qvl.runtime.errors import BackendError

MAX_DIMS: Final = 4
MAX_NAME: Final = 64

PROTOTYPES: Final = """
// types
const char * ggml_type_name(enum ggml_type type);
int64_t ggml_blck_size(enum ggml_type type);
size_t ggml_type_size(enum ggml_type type);
size_t ggml_row_size(enum ggml_type type, int64_t ne);
bool ggml_quantize_requires_imatrix(enum ggml_type type);
void ggml_quantize_init(enum ggml_type type);
size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix);
bool ggml_validate_row_data(enum ggml_type type, const void * data, size_t nbytes);
const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type type);
void ggml_fp16_to_fp32_row(const ggml_fp16_t * x, float * y, int64_t n);
void ggml_bf16_to_fp32_row(const ggml_bf16_t * x, float * y, int64_t n);
void ggml_fp32_to_fp16_row(const float * x, ggml_fp16_t * y, int64_t n);
void ggml_fp32_to_bf16_row(const float * x, ggml_bf16_t * y, int64_t n);
void ggml_log_set(ggml_log_callback * log_callback, void * user_data);

// contexts and tensors
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
size_t ggml_tensor_overhead(void);
size_t ggml_nbytes(const struct ggml_tensor * tensor);
struct ggml_tensor * ggml_new_tensor(struct ggml_context * ctx, enum ggml_type type, int n_dims, const int64_t * ne);
struct ggml_tensor * ggml_get_first_tensor(const struct ggml_context * ctx);
struct ggml_tensor * ggml_get_next_tensor(const struct ggml_context * ctx, struct ggml_tensor * tensor);
struct ggml_tensor * ggml_set_name(struct ggml_tensor * tensor, const char * name);
void ggml_set_input(struct ggml_tensor * tensor);
void ggml_set_output(struct ggml_tensor * tensor);

// operations
struct ggml_tensor * ggml_add(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_add_inplace(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_mul(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_mul_inplace(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_div_inplace(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_scale_bias_inplace(struct ggml_context * ctx, struct ggml_tensor * a, float s, float b);
struct ggml_tensor * ggml_get_rows(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_rms_norm(struct ggml_context * ctx, struct ggml_tensor * a, float eps);
struct ggml_tensor * ggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_norm(struct ggml_context * ctx, struct ggml_tensor * a, float eps);
struct ggml_tensor * ggml_silu_inplace(struct ggml_context * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_gelu_erf_inplace(struct ggml_context * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_cont(struct ggml_context * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_cast(struct ggml_context * ctx, struct ggml_tensor * a, enum ggml_type type);
struct ggml_tensor * ggml_cpy(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_concat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b, int dim);
struct ggml_tensor * ggml_pad(struct ggml_context * ctx, struct ggml_tensor * a, int p0, int p1, int p2, int p3);
struct ggml_tensor * ggml_permute(struct ggml_context * ctx, struct ggml_tensor * a, int axis0, int axis1, int axis2, int axis3);
struct ggml_tensor * ggml_reshape_4d(struct ggml_context * ctx, struct ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3);
struct ggml_tensor * ggml_view_4d(struct ggml_context * ctx, struct ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, size_t nb1, size_t nb2, size_t nb3, size_t offset);
struct ggml_tensor * ggml_soft_max_ext(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * mask, float scale, float max_bias);
struct ggml_tensor * ggml_rope_multi(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b, struct ggml_tensor * c, int n_dims, int * sections, int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow);
struct ggml_tensor * ggml_rope_multi_inplace(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b, struct ggml_tensor * c, int n_dims, int * sections, int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow);
struct ggml_tensor * ggml_flash_attn_ext(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v, struct ggml_tensor * mask, float scale, float max_bias, float logit_softcap);
struct ggml_tensor * ggml_custom_4d(struct ggml_context * ctx, enum ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, struct ggml_tensor * * args, int n_args, ggml_custom_op_t * fun, int n_tasks, void * userdata);
void ggml_flash_attn_ext_set_prec(struct ggml_tensor * a, enum ggml_prec prec);

// graphs
struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context * ctx, size_t size, bool grads);
size_t ggml_graph_overhead_custom(size_t size, bool grads);
void ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
int ggml_graph_n_nodes(struct ggml_cgraph * cgraph);
struct ggml_tensor * ggml_graph_node(struct ggml_cgraph * cgraph, int i);
void ggml_graph_add_node(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
const char * ggml_op_desc(const struct ggml_tensor * t);

// devices, backends, buffers
void ggml_backend_load_all_from_path(const char * dir_path);
size_t ggml_backend_dev_count(void);
ggml_backend_dev_t * ggml_backend_dev_get(size_t index);
const char * ggml_backend_dev_name(ggml_backend_dev_t * device);
const char * ggml_backend_dev_description(ggml_backend_dev_t * device);
void ggml_backend_dev_memory(ggml_backend_dev_t * device, size_t * free, size_t * total);
enum ggml_backend_dev_type ggml_backend_dev_type(ggml_backend_dev_t * device);
bool ggml_backend_dev_supports_op(ggml_backend_dev_t * device, const struct ggml_tensor * op);
ggml_backend_reg_t * ggml_backend_dev_backend_reg(ggml_backend_dev_t * device);
ggml_backend_reg_t * ggml_backend_reg_by_name(const char * name);
size_t ggml_backend_reg_dev_count(ggml_backend_reg_t * reg);
ggml_backend_dev_t * ggml_backend_reg_dev_get(ggml_backend_reg_t * reg, size_t index);
void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t * reg, const char * name);
void ggml_backend_register(ggml_backend_reg_t * reg);
ggml_backend_buffer_type_t * ggml_backend_dev_buffer_type(ggml_backend_dev_t * device);
ggml_backend_t * ggml_backend_dev_init(ggml_backend_dev_t * device, const char * params);
ggml_backend_dev_t * ggml_backend_get_device(ggml_backend_t * backend);
void ggml_backend_free(ggml_backend_t * backend);
ggml_backend_buffer_t * ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size);
ggml_backend_buffer_t * ggml_backend_alloc_ctx_tensors_from_buft(struct ggml_context * ctx, ggml_backend_buffer_type_t * buft);
size_t ggml_backend_alloc_ctx_tensors_from_buft_size(struct ggml_context * ctx, ggml_backend_buffer_type_t * buft);
ggml_backend_buffer_t * ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t * buft, size_t size);
bool ggml_backend_buft_is_host(ggml_backend_buffer_type_t * buft);
const char * ggml_backend_buft_name(ggml_backend_buffer_type_t * buft);
void ggml_backend_buffer_free(ggml_backend_buffer_t * buffer);
void ggml_backend_buffer_set_usage(ggml_backend_buffer_t * buffer, enum ggml_backend_buffer_usage usage);
size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t * buffer);
void * ggml_backend_buffer_get_base(ggml_backend_buffer_t * buffer);
enum ggml_status ggml_backend_tensor_alloc(ggml_backend_buffer_t * buffer, struct ggml_tensor * tensor, void * addr);
void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);

// scheduler
ggml_backend_sched_t * ggml_backend_sched_new(ggml_backend_t * backends, ggml_backend_buffer_type_t * bufts, int n_backends, size_t graph_size, bool parallel, bool op_offload);
void ggml_backend_sched_free(ggml_backend_sched_t * sched);
void ggml_backend_sched_reset(ggml_backend_sched_t * sched);
bool ggml_backend_sched_alloc_graph(ggml_backend_sched_t * sched, struct ggml_cgraph * graph);
enum ggml_status ggml_backend_graph_compute(ggml_backend_t * backend, struct ggml_cgraph * cgraph);
enum ggml_status ggml_backend_sched_graph_compute(ggml_backend_sched_t * sched, struct ggml_cgraph * graph);
size_t ggml_backend_sched_get_buffer_size(ggml_backend_sched_t * sched, ggml_backend_t * backend);
int ggml_backend_sched_get_n_splits(ggml_backend_sched_t * sched);
void ggml_backend_sched_set_eval_callback(ggml_backend_sched_t * sched, ggml_backend_sched_eval_callback * callback, void * user_data);
void ggml_backend_sched_reserve_size(ggml_backend_sched_t * sched, struct ggml_cgraph * measure_graph, size_t * sizes);

// GGUF
struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void gguf_free(struct gguf_context * ctx);
uint32_t gguf_get_version(const struct gguf_context * ctx);
size_t gguf_get_alignment(const struct gguf_context * ctx);
size_t gguf_get_data_offset(const struct gguf_context * ctx);
int64_t gguf_get_n_kv(const struct gguf_context * ctx);
const char * gguf_get_key(const struct gguf_context * ctx, int64_t key_id);
enum gguf_type gguf_get_kv_type(const struct gguf_context * ctx, int64_t key_id);
enum gguf_type gguf_get_arr_type(const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_val_data(const struct gguf_context * ctx, int64_t key_id);
const char * gguf_get_val_str(const struct gguf_context * ctx, int64_t key_id);
size_t gguf_get_arr_n(const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_arr_data(const struct gguf_context * ctx, int64_t key_id);
const char * gguf_get_arr_str(const struct gguf_context * ctx, int64_t key_id, size_t i);
int64_t gguf_get_n_tensors(const struct gguf_context * ctx);
size_t gguf_get_tensor_offset(const struct gguf_context * ctx, int64_t tensor_id);
const char * gguf_get_tensor_name(const struct gguf_context * ctx, int64_t tensor_id);
const int64_t * gguf_get_tensor_ne(const struct gguf_context * ctx, int64_t tensor_id);
enum ggml_type gguf_get_tensor_type(const struct gguf_context * ctx, int64_t tensor_id);
size_t gguf_get_tensor_size(const struct gguf_context * ctx, int64_t tensor_id);
struct gguf_context * gguf_init_empty(void);
void gguf_set_val_u32(struct gguf_context * ctx, const char * key, uint32_t val);
void gguf_set_val_str(struct gguf_context * ctx, const char * key, const char * val);
void gguf_set_arr_str(struct gguf_context * ctx, const char * key, const char * const * data, size_t n);
void gguf_set_kv(struct gguf_context * ctx, const struct gguf_context * src);
void gguf_add_tensor(struct gguf_context * ctx, const struct ggml_tensor * tensor);
size_t gguf_get_meta_size(const struct gguf_context * ctx);
void gguf_get_meta_data(const struct gguf_context * ctx, void * data);
"""


class Type(IntEnum):
    """`enum ggml_type` (ggml.h), the members that a GGUF file may hold."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30


class Status(IntEnum):
    """`enum ggml_status` (ggml.h)."""

    ALLOC_FAILED = -2
    FAILED = -1
    SUCCESS = 0
    ABORTED = 1


class InitParams(ctypes.Structure):
    """`struct ggml_init_params` (ggml.h)."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class GGUFInitParams(ctypes.Structure):
    """`struct gguf_init_params` (gguf.h)."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class TensorStruct(ctypes.Structure):
    """`struct ggml_tensor` (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


# bool callback(struct ggml_tensor * t, bool ask, void * user_data)
EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)

_C_TYPES: Final[dict[str, Any]] = {
    "void": None,
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "struct ggml_init_params": InitParams,
    "struct gguf_init_params": GGUFInitParams,
}
PINNED: Final = "0.3.36"
_OBJECT_BYTES: Final = 32  # sizeof(struct ggml_object), ggml.c
_PROTOTYPE = re.compile(r"^(?P<returns>.+?)(?P<name>\w+)\((?P<args>.*)\);$")
_LIBRARIES: Final = ("ggml-base", "ggml-cpu", "ggml")
_SUFFIX: Final = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def _ctype(declaration: str) -> Any:
    """The ctypes type of a C type, qualifiers and all."""
    text = " ".join(declaration.split())
    if text == "const char *":
        return ctypes.c_char_p
    if text.endswith("*"):
        return ctypes.c_void_p
    return ctypes.c_int if text.startswith("enum ") else _C_TYPES[text]


def _arguments(text: str) -> list[Any]:
    parts = [] if text == "void" else text.split(",")
    return [_ctype(re.sub(r"\w+$", "", part.strip())) for part in parts]


def directory() -> Path:
    """The folder of llama-cpp-python's shared libraries.

    Raises:
        BackendError: the package is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(
            "llama-cpp-python is not installed", hint=f"pip install llama-cpp-python=={PINNED}"
        )
    return Path(spec.submodule_search_locations[0]) / "lib"


def _check_version() -> None:
    """Refuse another llama-cpp-python: structs are read and written at fixed offsets."""
    text = (directory().parent / "__init__.py").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"""__version__\s*=\s*["']([^"']+)""", text)
    if found is None or found[1] != PINNED:
        version = "of an unknown version" if found is None else found[1]
        raise BackendError(
            f"llama-cpp-python is {version}, expected {PINNED}",
            hint=f"pip install llama-cpp-python=={PINNED}",
        )


def _check_struct(overhead: int) -> None:
    """Refuse a libggml whose tensors have another size (`ggml_tensor_overhead`: a `ggml_object` and a tensor)."""
    expected = _OBJECT_BYTES + ctypes.sizeof(TensorStruct)
    if overhead != expected:
        raise BackendError(
            f"libggml's tensors take {overhead} bytes, expected {expected}: a build of another version",
            hint=f"reinstall llama-cpp-python=={PINNED}",
        )


def _open(name: str) -> ctypes.CDLL:
    folder = directory()
    for prefix in ("lib", ""):
        path = folder / f"{prefix}{name}{_SUFFIX}"
        if path.exists():
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    raise BackendError(
        f"{folder}: lib{name}{_SUFFIX} is missing",
        hint=f"reinstall llama-cpp-python=={PINNED} (shared build)",
    )


@contextmanager
def _short_spins() -> Iterator[None]:
    """Have libgomp, which reads it when it is loaded, let threads spin at a barrier for 50 us and not for 5 ms.

    On an idle machine that costs up to 4% of generation. Where others want the cores too, a thread that spins
    burns the time of one that it waits for, and tokens came at half the speed or less (benchmarks/README.md).
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "2000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


@lru_cache(maxsize=1)
def lib() -> SimpleNamespace:
    """Every function of `PROTOTYPES`, ready to call; loaded on first use.

    Raises:
        BackendError: the libraries, or one of the functions, are missing, or of another version.
    """
    _check_version()
    with _short_spins():
        handles = [_open(name) for name in _LIBRARIES]
    functions = SimpleNamespace()
    for line in PROTOTYPES.splitlines():
        match = _PROTOTYPE.match(line)
        if match is None:
            continue
        name = match["name"]
        found = next((h for h in handles if hasattr(h, name)), None)
        if found is None:
            raise BackendError(f"libggml has no {name}", hint=f"install llama-cpp-python=={PINNED}")
        function = getattr(found, name)
        function.restype = _ctype(match["returns"])
        function.argtypes = _arguments(match["args"])
        setattr(functions, name, function)
    functions.handles = handles
    _check_struct(int(functions.ggml_tensor_overhead()))
    # Until llama.cpp's log is routed, ggml's goes nowhere, by a function that takes nothing and does nothing.
    functions.ggml_log_set(ctypes.cast(functions.ggml_tensor_overhead, ctypes.c_void_p), None)
    return functions


def tensor(pointer: int) -> TensorStruct:
    """The struct behind a `ggml_tensor *`."""
    return TensorStruct.from_address(pointer)


def block_size(kind: Type | int) -> int:
    """Elements in a block of a type (`ggml_blck_size`)."""
    return int(lib().ggml_blck_size(int(kind)))


def row_size(kind: Type | int, n: int) -> int:
    """Bytes of a row of n elements, n a multiple of the block size (`ggml_row_size`)."""
    return int(lib().ggml_row_size(int(kind), n))
