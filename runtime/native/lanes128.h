/* Registers of 128 bits (NEON), products of float32, and the question whether a processor has an instruction set. */
#pragma once

#include "kernels.h"

#include <arm_neon.h>
#include <string.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

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

/* By Linux' bit in an auxiliary vector, macOS' name and Windows' number of it. */
static inline int processor_has(int vector, int bit, const char * name, int feature) {
    (void) vector, (void) bit, (void) name, (void) feature;
#if defined(__linux__)
    return (int) (getauxval((unsigned long) vector) >> bit & 1);
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(name, &found, &size, NULL, 0) == 0 && found;
#elif defined(_WIN32)
    return IsProcessorFeaturePresent((DWORD) feature) != 0;
#else
    return 0;
#endif
}

static inline int has_dot_products(void) {
    return processor_has(16, 20, "hw.optional.arm.FEAT_DotProd", 43); /* AT_HWCAP, HWCAP_ASIMDDP */
}
