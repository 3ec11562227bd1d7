/* Vectors of floats and integers, in GNU C's vector extensions; the level has defined LANES, and the type vf. */
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef int16_t vh __attribute__((vector_size(2 * LANES)));

INLINE vf load(const void * p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE vi load_int(const void * p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(void * p, vf x) { memcpy(p, &x, sizeof x); }
INLINE void store_int(void * p, vi x) { memcpy(p, &x, sizeof x); }

/* A matrix of LANES rows and columns, transposed by log2(LANES) perfect shuffles. */
INLINE void transpose(vi * rows) {
    for (int step = 1; step < LANES; step *= 2) {
        vi next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            zip(rows[i], rows[i + LANES / 2], &next[2 * i], &next[2 * i + 1]);
        }
        memcpy(rows, next, sizeof next);
    }
}

/* The 4 bytes at p in every lane. */
INLINE vi spread(const void * p) {
    int32_t x;
    memcpy(&x, p, 4);
    return splat_int(x);
}

INLINE vf absolute(vf x) { return (vf) ((vi) x & splat_int(0x7fffffff)); }

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* 2^x for x <= 100, 0 below -126; relative error below 5e-6, less than a step of what the result is rounded to. */
INLINE vf rough_exp2(vf x) {
    x = larger(x, splat(-126.0f));
    const vi whole = nearest(x);
    const vf rest = x - to_float(whole);
    vf p = splat(9.5828e-3f);
    p = p * rest + splat(5.59064e-2f);
    p = p * rest + splat(2.4024099e-1f);
    p = p * rest + splat(6.9312419e-1f);
    p = p * rest + splat(1.0f);
    return (vf) ((vi) p + (whole << 23));
}

/* 2^x, x held within [-126, 126]; relative error below 2^-22: 2^round(x) times a Taylor series of the rest. */
INLINE vf exp2_of(vf x) {
    x = smaller(larger(x, splat(-126.0f)), splat(126.0f));
    const vi whole = nearest(x);
    const vf rest = x - to_float(whole);
    vf p = splat(1.5403530e-4f);
    p = p * rest + splat(1.3333558e-3f);
    p = p * rest + splat(9.6181291e-3f);
    p = p * rest + splat(5.5504109e-2f);
    p = p * rest + splat(2.4022651e-1f);
    p = p * rest + splat(6.9314718e-1f);
    p = p * rest + splat(1.0f);
    return (vf) ((vi) p + (whole << 23));
}

/* erf by Abramowitz and Stegun, 7.1.26: absolute error below 2e-7. */
INLINE vf erf_of(vf x) {
    const vf size = absolute(x), t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * size);
    vf p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    const vf y = splat(1.0f) - p * t * exp2_of(splat(-1.44269504f) * size * size);
    return (vf) ((vi) y | ((vi) x & splat_int((int32_t) 0x80000000)));
}

/* x times the logistic function of y. */
INLINE vf times_sigmoid(vf x, vf y) { return x / (splat(1.0f) + exp2_of(y * splat(-1.44269504f))); }

INLINE vf activate(vf x, int act) {
    switch (act) {
        case QVL_SILU: return times_sigmoid(x, x);
        case QVL_GELU_QUICK: return times_sigmoid(x, x * splat(1.702f));
        case QVL_GELU_TANH: return times_sigmoid(x, splat(1.5957691216f) * (x + splat(0.044715f) * x * x * x));
        case QVL_GELU_ERF: return splat(0.5f) * x * (splat(1.0f) + erf_of(x * splat(0.70710678f)));
        default: return x;
    }
}

enum { AHEAD = 8 }; /* rows from one that is read to one that is fetched */

/* Asks for `bytes` at p before they are read or written: short pieces far apart show the processor no pattern. */
INLINE void fetch(const char * p, int64_t bytes, const int write) {
    for (int64_t i = 0; i < bytes; i += 64) {
        if (write) {
            __builtin_prefetch(p + i, 1);
        } else {
            __builtin_prefetch(p + i, 0);
        }
    }
}

/* Memory whose first byte lies at a cache line; *base is what to free. NULL where there is none. */
static inline char * allocate(size_t bytes, void ** base) {
    *base = malloc(bytes + 64);
    return *base == NULL ? NULL : (char *) (((uintptr_t) *base + 63) & ~(uintptr_t) 63);
}
