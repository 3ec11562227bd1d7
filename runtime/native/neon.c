/* NEON with dot products (ARMv8.2): float32 by lanes of 4, bytes by sdot. */
#include "kernels.h"

#if defined(__aarch64__) && defined(__GNUC__)

#if defined(__clang__)
QVL_TARGET("dotprod")
#else
QVL_TARGET("arch=armv8.2-a+dotprod")
#endif

#include <arm_neon.h>
#include <string.h>

#define LANES 4
#define VECTORS 4 /* registers of rows of W; ROWS * VECTORS sums, VECTORS weights and a column fit 32 registers */
#define ROWS 6    /* columns of x */
#define WIDE_GROUP 1
#define WIDE_INTEGER 0
#define BYTE_OFFSET 0
#define BYTE_SUMS_16 0

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

INLINE vf splat(float x) { return (vf) vdupq_n_f32(x); }
INLINE vi splat_int(int32_t x) { return (vi) vdupq_n_s32(x); }
INLINE vi nearest(vf x) { return (vi) vcvtnq_s32_f32((float32x4_t) x); } /* ties to even */
INLINE vf larger(vf a, vf b) { return (vf) vmaxq_f32((float32x4_t) a, (float32x4_t) b); }
INLINE vf smaller(vf a, vf b) { return (vf) vminq_f32((float32x4_t) a, (float32x4_t) b); }
INLINE float across_max(vf x) { return vmaxvq_f32((float32x4_t) x); }
INLINE float across_sum(vf x) { return vaddvq_f32((float32x4_t) x); }

/* 8-bit integers, and unsigned 16-bit ones. */
INLINE vi load_bytes(const void * p) {
    int8x8_t x = vdup_n_s8(0);
    memcpy(&x, p, 4);
    return (vi) vmovl_s16(vget_low_s16(vmovl_s8(x)));
}

INLINE vi load_halves(const void * p) {
    uint16x4_t x;
    memcpy(&x, p, 8);
    return (vi) vmovl_u16(x);
}

/* As 8-bit integers, saturated. */
INLINE void store_bytes(void * p, vi x) {
    const int16x4_t narrow = vqmovn_s32((int32x4_t) x);
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(narrow, narrow));
    memcpy(p, &bytes, 4);
}

/* The lanes of a and b in turns: the first halves to *first, the rest to *second. */
INLINE void zip(vi a, vi b, vi * first, vi * second) {
    *first = (vi) vzip1q_s32((int32x4_t) a, (int32x4_t) b);
    *second = (vi) vzip2q_s32((int32x4_t) a, (int32x4_t) b);
}

INLINE vf wide_dot(vf acc, vi w, vi x) {
    return (vf) vfmaq_f32((float32x4_t) acc, (float32x4_t) w, (float32x4_t) x);
}

INLINE vi byte_dot(vi acc, vi w, vi x) { return (vi) vdotq_s32((int32x4_t) acc, (int8x16_t) w, (int8x16_t) x); }

#include "level.h"

#if defined(__linux__)
#include <sys/auxv.h>
static int supported(void) { return (int) (getauxval(AT_HWCAP) >> 20 & 1); /* HWCAP_ASIMDDP */ }
#elif defined(__APPLE__)
static int supported(void) { return 1; /* every Mac with an ARM processor */ }
#else
static int supported(void) { return 0; }
#endif

QVL_LEVEL("neon", neon)

QVL_TARGET_END

#endif
