/* Registers of 512 bits (AVX-512), of which there are 32. */
#pragma once

#include "kernels.h"

#include <immintrin.h>

#define LANES 16
#define VECTORS 2 /* registers of rows of W; ROWS * VECTORS sums of integers, as many of floats, VECTORS weights */
#define ROWS 6    /* columns of x */

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

INLINE vf splat(float x) { return (vf) _mm512_set1_ps(x); }
INLINE vi splat_int(int32_t x) { return (vi) _mm512_set1_epi32(x); }
INLINE vi nearest(vf x) { return (vi) _mm512_cvtps_epi32((__m512) x); } /* ties to even */
INLINE vf larger(vf a, vf b) { return (vf) _mm512_max_ps((__m512) a, (__m512) b); }
INLINE vf smaller(vf a, vf b) { return (vf) _mm512_min_ps((__m512) a, (__m512) b); }
INLINE float across_max(vf x) { return _mm512_reduce_max_ps((__m512) x); }
INLINE float across_sum(vf x) { return _mm512_reduce_add_ps((__m512) x); }

/* 8-bit integers, and unsigned 16-bit ones. */
INLINE vi load_bytes(const void * p) { return (vi) _mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE vi load_halves(const void * p) { return (vi) _mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }

/* As 16-bit or 8-bit integers, saturated. */
INLINE void store_narrow(void * p, vi x) { _mm256_storeu_si256(p, _mm512_cvtsepi32_epi16((__m512i) x)); }
INLINE void store_bytes(void * p, vi x) { _mm_storeu_si128(p, _mm512_cvtsepi32_epi8((__m512i) x)); }

/* The lanes of a and b in turns: the first halves to *first, the rest to *second. */
INLINE void zip(vi a, vi b, vi * first, vi * second) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    *first = (vi) _mm512_permutex2var_epi32((__m512i) a, low, (__m512i) b);
    *second = (vi) _mm512_permutex2var_epi32((__m512i) a, high, (__m512i) b);
}
