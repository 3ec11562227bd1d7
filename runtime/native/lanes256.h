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
INLINE vi nearest(vf x) { return (vi) _mm256_cvtps_epi32((__m256) x); } /* ties to even */
INLINE vf larger(vf a, vf b) { return (vf) _mm256_max_ps((__m256) a, (__m256) b); }
INLINE vf smaller(vf a, vf b) { return (vf) _mm256_min_ps((__m256) a, (__m256) b); }

/* 8-bit integers, and unsigned 16-bit ones. */
INLINE vi load_bytes(const void * p) { return (vi) _mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
INLINE vi load_halves(const void * p) { return (vi) _mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }

/* As 16-bit integers, saturated. */
INLINE void store_narrow(void * p, vi x) {
    const __m128i low = _mm256_castsi256_si128((__m256i) x), high = _mm256_extracti128_si256((__m256i) x, 1);
    _mm_storeu_si128(p, _mm_packs_epi32(low, high));
}

/* As 8-bit integers, saturated. */
INLINE void store_bytes(void * p, vi x) {
    const __m128i low = _mm256_castsi256_si128((__m256i) x), high = _mm256_extracti128_si256((__m256i) x, 1);
    const __m128i narrow = _mm_packs_epi32(low, high);
    _mm_storel_epi64(p, _mm_packs_epi16(narrow, narrow));
}

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
