/* What the kernels share: the instruction set, bfloat16 and exponentials. */
#pragma once

#include "ggml_abi.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define QVL_AVX512_BF16

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { LANES = 16 }; /* floats in a register */

static inline int qvl_has_avx512_bf16(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

/* 2^x for x in [-126, 126]; beyond, that of the nearer end. */
INLINE __m512 exp2_clamped(__m512 x) {
    /* 2^x = 2^round(x) * p(x - round(x)); p by its Taylor series, relative error below 2^-22 on [-1/2, 1/2] */
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-126.0f)), _mm512_set1_ps(126.0f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* 2^x for x <= 0, 2^-126 at least; relative error below 3e-6, by a minimax polynomial of the fraction. */
INLINE __m512 exp2_falling(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    __m512 p = _mm512_set1_ps(1.353416792e-2f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.201146061e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.414427569e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.930038345e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.000002593f));
    return _mm512_scalef_ps(p, x); /* p * 2^floor(x) */
}

INLINE __m512bh as_bf16(__m512i x) { return (__m512bh) x; }

/* Row of floats to bfloat16, zeros up to the full width. */
INLINE void to_bf16(uint16_t * out, const float * in, int n, int n_pad) {
    for (int i = 0; i < n_pad; i += LANES) {
        const int left = n - i;
        const __mmask16 mask = left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16) ((1u << left) - 1);
        const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, in + i));
        _mm256_storeu_si256((__m256i *) (out + i), (__m256i) half);
    }
}

#endif
