/* A register of floats for one instruction set, and the few operations that the searches need.
 *
 * Included once for each set, with AVX512 defined to 1 or 0. NAME gives each set its own functions.
 */
#undef LANES
#undef NAME
#undef TARGET
#undef INLINE
#undef VF
#undef VI
#undef VM

#if AVX512
#define LANES 16
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#define VF __m512
#define VI __m512i
#define VM __mmask16
#else
#define LANES 8
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,f16c")))
#define VF __m256
#define VI __m256i
#define VM __m256
#endif
#define INLINE TARGET static inline __attribute__((always_inline))

#if AVX512
INLINE VF NAME(all)(float x) { return _mm512_set1_ps(x); }
INLINE VF NAME(load)(const float * p) { return _mm512_loadu_ps(p); }
INLINE void NAME(store)(float * p, VF x) { _mm512_storeu_ps(p, x); }
INLINE VM NAME(less)(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE VM NAME(both)(VM a, VM b) { return a & b; }
INLINE VF NAME(pick)(VM mask, VF yes, VF no) { return _mm512_mask_mov_ps(no, mask, yes); }
INLINE VF NAME(magnitude)(VF x) { return _mm512_abs_ps(x); }
INLINE VF NAME(root)(VF x) { return _mm512_sqrt_ps(x); }
/* What ggml-quants.c's nearest_int gives, whatever x is, kept between low and high. */
INLINE VF NAME(level)(VF x, int low, int high) {
    VI i = _mm512_and_si512(_mm512_castps_si512(x + _mm512_set1_ps(ROUNDER)), _mm512_set1_epi32(0x7fffff));
    i = _mm512_sub_epi32(i, _mm512_set1_epi32(0x400000));
    i = _mm512_max_epi32(_mm512_min_epi32(i, _mm512_set1_epi32(high)), _mm512_set1_epi32(low));
    return _mm512_cvtepi32_ps(i);
}
#else
INLINE VF NAME(all)(float x) { return _mm256_set1_ps(x); }
INLINE VF NAME(load)(const float * p) { return _mm256_loadu_ps(p); }
INLINE void NAME(store)(float * p, VF x) { _mm256_storeu_ps(p, x); }
INLINE VM NAME(less)(VF a, VF b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE VM NAME(both)(VM a, VM b) { return _mm256_and_ps(a, b); }
INLINE VF NAME(pick)(VM mask, VF yes, VF no) { return _mm256_blendv_ps(no, yes, mask); }
INLINE VF NAME(magnitude)(VF x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE VF NAME(root)(VF x) { return _mm256_sqrt_ps(x); }
INLINE VF NAME(level)(VF x, int low, int high) {
    VI i = _mm256_and_si256(_mm256_castps_si256(x + _mm256_set1_ps(ROUNDER)), _mm256_set1_epi32(0x7fffff));
    i = _mm256_sub_epi32(i, _mm256_set1_epi32(0x400000));
    i = _mm256_max_epi32(_mm256_min_epi32(i, _mm256_set1_epi32(high)), _mm256_set1_epi32(low));
    return _mm256_cvtepi32_ps(i);
}
#endif
