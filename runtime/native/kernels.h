/* What every level of kernels has in common: their table, their parameters, and how a file asks for instructions. */
#pragma once

#include "ggml_abi.h"

/* Formats of activations: columns of x as a linear layer reads them. */
enum { QVL_F32 = 0, QVL_WIDE = 1, QVL_BYTES = 2 };

/* What follows a product: an activation, then a tensor that is added or multiplied. */
enum { QVL_NONE = 0, QVL_SILU = 1, QVL_GELU_ERF = 2, QVL_GELU_TANH = 3, QVL_GELU_QUICK = 4 };
enum { QVL_ADD = 0, QVL_MULTIPLY = 1 };
enum { QVL_LAYER_NORM = 0, QVL_RMS_NORM = 1 };

/* What is packed in qvl_params.choice of linear, norm and prepare. */
#define QVL_FIRST(choice) ((choice) & 0xff)        /* linear: the activation; norm: the kind */
#define QVL_SECOND(choice) ((choice) >> 8 & 0xff)  /* linear: how src[3] is combined */
#define QVL_INPUT(choice) ((choice) >> 24 & 0xff)  /* linear: the format of x, or 0 for the one that W's type takes */
#define QVL_FORMAT(choice) ((choice) >> 16 & 0xff) /* the format of dst */

/* One level: the kernels (each a ggml_custom_op_t) compiled for one set of instructions. */
struct qvl_kernels {
    const char * name;
    int (*supported)(void);
    void (*attention)(struct ggml_tensor * dst, int ith, int nth, void * userdata);
    void (*linear)(struct ggml_tensor * dst, int ith, int nth, void * userdata);
    void (*norm)(struct ggml_tensor * dst, int ith, int nth, void * userdata);
    void (*prepare)(struct ggml_tensor * dst, int ith, int nth, void * userdata);
    int max_head;
    int (*takes)(int type);                             /* the format of x that weights of a ggml type want; 0: none */
    int64_t (*row_bytes)(int format, int64_t n_in);     /* bytes of a column of x */
};

#if defined(__GNUC__)

#define QVL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QVL_TARGET(set) QVL_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define QVL_TARGET_END QVL_PRAGMA(clang attribute pop)
#else
#define QVL_TARGET(set) QVL_PRAGMA(GCC push_options) QVL_PRAGMA(GCC target(set))
#define QVL_TARGET_END QVL_PRAGMA(GCC pop_options)
#endif

#define INLINE static inline __attribute__((always_inline))

#endif
