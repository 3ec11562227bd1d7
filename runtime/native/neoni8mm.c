/* NEON with products of 2x8 by 8x2 bytes (FEAT_I8MM, ARMv8.6 and some before): smmla multiplies twice as many pairs
 * an instruction as sdot. */
#include "kernels.h"

#if defined(__aarch64__) && defined(__GNUC__)

#if defined(__clang__)
QVL_TARGET("dotprod,i8mm")
#else
QVL_TARGET("arch=armv8.2-a+dotprod+i8mm")
#endif

#include "lanes128.h"

#define BYTE_PAIRS 1

/* 8 bytes at each of two places. */
INLINE vi join(const void * a, const void * b) { return (vi) vcombine_s8(vld1_s8(a), vld1_s8(b)); }

/* The products of two columns, x, with two rows, w: column 0 with row 0 and 1, column 1 with row 0 and 1. */
INLINE vi pair_dot(vi acc, vi x, vi w) {
    __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(x), "w"(w));
    return acc;
}

/* The products of two columns with four rows, a column in a register. */
INLINE void split(vi a, vi b, vi * first, vi * second) {
    *first = (vi) vtrn1q_s64((int64x2_t) a, (int64x2_t) b);
    *second = (vi) vtrn2q_s64((int64x2_t) a, (int64x2_t) b);
}

#include "level.h"

static int supported(void) {
    return has_dot_products() && processor_has(26, 13, "hw.optional.arm.FEAT_I8MM", 66); /* AT_HWCAP2, HWCAP2_I8MM */
}

QVL_LEVEL("neoni8mm", neoni8mm)

QVL_TARGET_END

#endif
