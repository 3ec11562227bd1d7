/* Q4_K, Q5_K and Q6_K as libggml quantizes them, to the same bytes, many blocks at once.
 *
 * ggml-quants.c tries some twenty scales on a block of 16 or 32 weights, one block after the other. Here each
 * lane of a register does that for a block of its own. The order of additions within a block, on which the
 * last bit depends, is kept; so the result is the same where ggml was compiled without fused multiply-add,
 * which x86-64 is by default. Whoever calls this compares first.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ROUNDER 12582912.0f /* added to a float, leaves the nearest integer in the low bits */
#define NEXT_TO_NOTHING 1e-15f

enum {
    QK = 256,
    AFFINE_BLOCK = 32,
    SYMMETRIC_BLOCK = 16,
    MAX_BLOCK = 32,
    MAX_LANES = 16,
    Q4_BYTES = 144,
    Q5_BYTES = 176,
    Q6_BYTES = 210,
};

/* Levels from 0 to `top`; `steps` + 1 roundings, of (first + delta * i + top) levels to the block's span. */
typedef struct {
    int top, steps;
    float first, delta;
} Search;

typedef struct {
    float scale[MAX_LANES], offset[MAX_LANES], low[MAX_LANES], inverse[MAX_LANES], sum[MAX_LANES];
} Affine;

typedef struct {
    float scale[MAX_LANES], inverse[MAX_LANES], largest[MAX_LANES];
} Symmetric;

#define AVX512 1
#include "lanes.h"
#include "search.h"
#include "pack.h"
#undef AVX512

#define AVX512 0
#include "lanes.h"
#include "search.h"
#include "pack.h"
#undef AVX512

/* 2: AVX-512, 1: AVX2, 0: neither. */
static int level(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return 2;
    }
    return __builtin_cpu_supports("avx2") ? 1 : 0;
}

EXPORT int qvl_kquants_level(void) { return level(); }

/* Quantize n_rows of n_per_row floats to ggml type `type` (12, 13 or 14: Q4_K, Q5_K, Q6_K).
 * importance: [n_per_row], or NULL. wanted: an instruction set from qvl_kquants_level, or less. */
EXPORT int qvl_kquants(
    int type, const float * x, uint8_t * out, int64_t n_rows, int64_t n_per_row, const float * importance, int wanted
) {
    static const Search plain[] = {{15, 20, -1.0f, 0.1f}, {31, 15, -0.5f, 0.1f}};
    static const Search weighed[] = {{15, 36, -0.9f, 0.05f}, {31, 36, -0.9f, 0.05f}};
    const int64_t n_columns = n_per_row / QK, n = n_rows * n_columns;
    if (type < 12 || type > 14 || n_per_row % QK != 0 || wanted < 1 || wanted > level()) {
        return 0;
    }
    if (type == 14) {
        (wanted == 2 ? quantize_symmetric_avx512 : quantize_symmetric_avx2)(x, out, n, n_columns, importance);
    } else {
        const Search * search = (importance == NULL ? plain : weighed) + (type - 12);
        (wanted == 2 ? quantize_affine_avx512 : quantize_affine_avx2)(x, out, n, n_columns, importance, search);
    }
    return 1;
}

#else

EXPORT int qvl_kquants_level(void) { return 0; }
EXPORT int qvl_kquants(
    int type, const float * x, uint8_t * out, int64_t n_rows, int64_t n_per_row, const float * importance, int wanted
) {
    (void) type, (void) x, (void) out, (void) n_rows, (void) n_per_row, (void) importance, (void) wanted;
    return 0;
}

#endif
