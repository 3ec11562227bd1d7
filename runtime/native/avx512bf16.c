/* AVX512_BF16 beside AVX512_VNNI: pairs of bfloat16 in place of integers, without scales of blocks. AMD's cores
 * multiply as many of either an instruction, Intel's far more integers. */
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

QVL_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")

#include "lanes512.h"

#define WIDE_GROUP 2
#define WIDE_INTEGER 0
#define BYTE_OFFSET 128
#define BYTE_SUMS_16 0

INLINE vf wide_dot(vf acc, vi w, vi x) { return (vf) _mm512_dpbf16_ps((__m512) acc, (__m512bh) w, (__m512bh) x); }

INLINE vi byte_dot(vi acc, vi w, vi x) {
    return (vi) _mm512_dpbusd_epi32((__m512i) acc, (__m512i) w, (__m512i) x);
}

INLINE __m256bh to_bf16(vf x) { return _mm512_cvtneps_pbh((__m512) x); }

#include "level.h"

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

QVL_LEVEL("avx512bf16", avx512bf16)

QVL_TARGET_END

#endif
