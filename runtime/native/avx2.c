/* AVX2: pairs of 16-bit integers; of bytes, sums in 16 bits for as long as weights of 4 and 5 bits cannot overflow
 * them. 8-bit weights would at once, and are multiplied as 16-bit ones. */
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

QVL_TARGET("avx2,fma")

#include "lanes256.h"

#define WIDE_GROUP 2
#define WIDE_INTEGER 1
#define BYTE_OFFSET 128
#define BYTE_SUMS_16 1

/* A sum in a register at this point: the compiler would add products among themselves first, and keep all of them. */
#define IN_ORDER(sum) __asm__("" : "+x"(sum))

INLINE vi wide_dot(vi acc, vi w, vi x) {
    acc += (vi) _mm256_madd_epi16((__m256i) w, (__m256i) x);
    IN_ORDER(acc);
    return acc;
}

INLINE vi byte_dot(vi acc, vi w, vi x) {
    acc = (vi) _mm256_add_epi16((__m256i) acc, _mm256_maddubs_epi16((__m256i) w, (__m256i) x));
    IN_ORDER(acc);
    return acc;
}

INLINE vi add_pairs(vi acc, vi sums) { return acc + (vi) _mm256_madd_epi16((__m256i) sums, _mm256_set1_epi16(1)); }

#include "level.h"

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

QVL_LEVEL("avx2", avx2)

QVL_TARGET_END

#endif
