/* Registers of 256 bits (AVX2). */
#pragma once

#include "kernels.h"

#include <immintrin.h>

#define LANES 8
#define VECTORS 2 /* registers of rows of W; ROWS * VECTORS sums, VECTORS weights, a column and a product: 16 */
#define ROWS 6    /* columns of x */

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

INLINE vf splat(float x) { return (vf) _mm256_set1_ps(x); }
INLINE vi splat_int(int32_t x) { return (vi) _mm256_set1_epi32(x); }
INLINE vf larger(vf a, vf b) { return (vf) _mm256_max_ps((__m256) a, (__m256) b); }
INLINE vf smaller(vf a, vf b) { return (vf) _mm256_min_ps((__m256) a, (__m256) b); }

/* The lanes of a and b in turns: the first halves to *first, the rest to *second. */
INLINE void zip(vi a, vi b, vi * first, vi * second) {
    const __m256i low = _mm256_unpacklo_epi32((__m256i) a, (__m256i) b);
    const __m256i high = _mm256_unpackhi_epi32((__m256i) a, (__m256i) b);
    *first = (vi) _mm256_permute2x128_si256(low, high, 0x20);
    *second = (vi) _mm256_permute2x128_si256(low, high, 0x31);
}

INLINE float across_max(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256) x), _mm256_extractf128_ps((__m256) x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

INLINE float across_sum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256) x), _mm256_extractf128_ps((__m256) x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
