/* Rows of numbers as the products read them: blocks of integers with a scale each ("bytes": 8 bits; "wide": 13
 * bits), or plain bfloat16 or float32 where the level multiplies those ("wide" too). */
#pragma once

#include "vector.h"

enum {
    WIDE_BLOCK = 64,  /* values that share a scale */
    BYTE_BLOCK = 32,
    WIDE_LIMIT = 5792, /* WIDE_BLOCK * WIDE_LIMIT^2 < 2^31: sums of a block never overflow */
    BYTE_LIMIT = 128,
};

#if WIDE_INTEGER
struct wide {
    float scale;
    int16_t q[WIDE_BLOCK];
};
#elif WIDE_GROUP == 2
struct wide {
    uint16_t q[WIDE_BLOCK]; /* bfloat16 */
};
#else
struct wide {
    float q[WIDE_BLOCK];
};
#endif

#define BYTE_UNIT (BYTE_OFFSET == 0 ? 1 : -BYTE_OFFSET)

struct bytes {
    float scale;
    int32_t sum; /* of BYTE_UNIT * q: where weights are stored with an offset, sums of products begin with it */
    int8_t q[BYTE_BLOCK];
};

static int64_t row_bytes(int format, int64_t n_in) {
    return format == QVL_WIDE    ? (n_in + WIDE_BLOCK - 1) / WIDE_BLOCK * (int64_t) sizeof(struct wide)
           : format == QVL_BYTES ? (n_in + BYTE_BLOCK - 1) / BYTE_BLOCK * (int64_t) sizeof(struct bytes)
                                 : n_in * 4;
}

INLINE float largest(const float * x, int n) {
    vf top = absolute(load(x));
    for (int i = LANES; i < n; i += LANES) {
        top = larger(top, absolute(load(x + i)));
    }
    return across_max(top);
}

/* WIDE_BLOCK floats. */
INLINE void put_wide(struct wide * out, const float * x) {
#if WIDE_INTEGER
    const float top = largest(x, WIDE_BLOCK), inverse = top > 0.0f ? WIDE_LIMIT / top : 0.0f;
    out->scale = top / WIDE_LIMIT;
    for (int i = 0; i < WIDE_BLOCK; i += LANES) {
        store_narrow(out->q + i, nearest(load(x + i) * splat(inverse)));
    }
#elif WIDE_GROUP == 2
    for (int i = 0; i < WIDE_BLOCK; i += LANES) {
        const vh q = (vh) to_bf16(load(x + i));
        memcpy(out->q + i, &q, sizeof q);
    }
#else
    memcpy(out->q, x, sizeof out->q);
#endif
}

INLINE int32_t across_sum_int(vi x) {
    return (int32_t) across_sum(to_float(x)); /* exact below 2^24 */
}

/* BYTE_BLOCK floats. Of a few steps between integers, each an integer fraction of the largest value, the one is
 * taken that loses the least (squares of the rounding errors); the largest becomes -128, -127 or -126. */
INLINE void put_bytes(struct bytes * out, const float * x) {
    vf high = load(x), low = high;
    for (int i = LANES; i < BYTE_BLOCK; i += LANES) {
        high = larger(high, load(x + i));
        low = smaller(low, load(x + i));
    }
    const float above = across_max(high), below = across_max(-low), top = above > below ? above : -below;
    const int nothing = fmaxf(above, below) < 1e-30f; /* so little that its inverse might be infinite */
    float best = INFINITY, inverse = 0.0f;
    for (int limit = BYTE_LIMIT; limit > BYTE_LIMIT - 3 && !nothing; limit--) {
        const float factor = (float) -limit / top;
        vf errors = splat(0.0f);
        for (int i = 0; i < BYTE_BLOCK; i += LANES) {
            const vf y = load(x + i) * splat(factor), e = y - to_float(nearest(smaller(y, splat(127.0f))));
            errors += e * e;
        }
        const float error = across_sum(errors) / (float) (limit * limit);
        if (error < best) {
            best = error;
            inverse = factor;
        }
    }
    out->scale = inverse == 0.0f ? 0.0f : 1.0f / inverse;
    vi sum = splat_int(0);
    for (int i = 0; i < BYTE_BLOCK; i += LANES) {
        const vi q = nearest(smaller(load(x + i) * splat(inverse), splat(127.0f)));
        store_bytes(out->q + i, q);
        sum += q;
    }
    out->sum = BYTE_UNIT * across_sum_int(sum);
}

/* Values [first, first + n) of a row in one of the formats; first is a multiple of WIDE_BLOCK, n at most that. x
 * has room for WIDE_BLOCK values: what is past n is set to 0. */
INLINE void put(char * row, int format, int64_t first, float * x, int n) {
    if (format == QVL_F32) {
        if (n == WIDE_BLOCK) { /* a size that the compiler knows */
            memcpy(row + first * 4, x, WIDE_BLOCK * 4);
        } else {
            memcpy(row + first * 4, x, (size_t) n * 4);
        }
        return;
    }
    if (n < WIDE_BLOCK) {
        memset(x + n, 0, (size_t) (WIDE_BLOCK - n) * 4);
    }
    if (format == QVL_WIDE) {
        put_wide((struct wide *) row + first / WIDE_BLOCK, x);
    } else {
        struct bytes * out = (struct bytes *) row + first / BYTE_BLOCK;
        for (int i = 0; i < n; i += BYTE_BLOCK) {
            put_bytes(out + i / BYTE_BLOCK, x + i);
        }
    }
}

/* n floats as wide blocks, zeros up to the end of the last. */
INLINE void put_wide_row(struct wide * out, const float * x, int n) {
    int i = 0;
    for (; i + WIDE_BLOCK <= n; i += WIDE_BLOCK) {
        put_wide(out++, x + i);
    }
    if (i < n) {
        float part[WIDE_BLOCK] = { 0 };
        memcpy(part, x + i, (size_t) (n - i) * 4);
        put_wide(out, part);
    }
}
