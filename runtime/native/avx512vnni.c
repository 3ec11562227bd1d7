/* AVX512_VNNI: products of bytes and of pairs of 16-bit integers, 512 bits at a time. */
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

QVL_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "lanes512.h"

#define WIDE_GROUP 2
#define WIDE_INTEGER 1
#define BYTE_OFFSET 128
#define BYTE_SUMS_16 0

INLINE vi wide_dot(vi acc, vi w, vi x) {
    return (vi) _mm512_dpwssd_epi32((__m512i) acc, (__m512i) w, (__m512i) x);
}

INLINE vi byte_dot(vi acc, vi w, vi x) {
    return (vi) _mm512_dpbusd_epi32((__m512i) acc, (__m512i) w, (__m512i) x);
}

#include "level.h"

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

QVL_LEVEL("avx512vnni", avx512vnni)

QVL_TARGET_END

#endif
