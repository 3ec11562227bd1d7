/* AVX-VNNI: AVX2 and products of bytes and of pairs of 16-bit integers that add to 32-bit sums at once. */
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

QVL_TARGET("avx2,fma,avxvnni")

#include "lanes256.h"

#include <cpuid.h>

#define WIDE_GROUP 2
#define WIDE_INTEGER 1
#define BYTE_OFFSET 128
#define BYTE_SUMS_16 0

INLINE vi wide_dot(vi acc, vi w, vi x) {
    return (vi) _mm256_dpwssd_avx_epi32((__m256i) acc, (__m256i) w, (__m256i) x);
}

INLINE vi byte_dot(vi acc, vi w, vi x) {
    return (vi) _mm256_dpbusd_avx_epi32((__m256i) acc, (__m256i) w, (__m256i) x);
}

#include "level.h"

static int supported(void) {
    unsigned a = 0, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
           (a >> 4 & 1);
}

QVL_LEVEL("avxvnni", avxvnni)

QVL_TARGET_END

#endif
