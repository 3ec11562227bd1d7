/* Weights as a file stores them (ggml-common.h), a row at a time: to float32, or to bytes with scale and minimum. */
#pragma once

#include "product.h"

enum { DEPTH = 256 }; /* inputs at a time: a panel of them fits L1, and K-quants have blocks of as many */

/* DEPTH weights of a row: scale * (q - BYTE_OFFSET) where the type has no minimum, else scale * q - min. */
struct byte_row {
    float scale[DEPTH / BYTE_BLOCK], min[DEPTH / BYTE_BLOCK];
    uint8_t q[DEPTH];
};

/* float16 to float32, without arithmetic on subnormal numbers, which takes some processors 150 cycles. */
INLINE vf halves_to_floats(vi halves) {
    const vi size = (halves & splat_int(0x7fff)) << 13, normal = size + splat_int(112 << 23);
    const vf subnormal = (vf) (normal + splat_int(1 << 23)) - splat(0x1p-14f);
    const vi small = size < splat_int(1 << 23);
    return (vf) ((small & (vi) subnormal) | (~small & normal) | (halves & splat_int(0x8000)) << 16);
}

INLINE float half_at(const void * p) {
    uint16_t half;
    memcpy(&half, p, 2);
    return halves_to_floats(splat_int(half))[0];
}

static void f16_to_float(float * out, const char * in, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        store(out + i, halves_to_floats(load_halves(in + 2 * i)));
    }
    for (; i < n; i++) {
        out[i] = half_at(in + 2 * i);
    }
}

static void bf16_to_float(float * out, const char * in, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        store(out + i, (vf) (load_halves(in + 2 * i) << 16));
    }
    for (; i < n; i++) {
        uint16_t half;
        memcpy(&half, in + 2 * i, 2);
        const uint32_t bits = (uint32_t) half << 16;
        memcpy(out + i, &bits, 4);
    }
}

static void f32_to_float(float * out, const char * in, int n) { memcpy(out, in, (size_t) n * 4); }

/* Q8_0: blocks of 32, a float16 scale and 32 int8. */
static void q8_0_to_float(float * out, const char * in, int n) {
    for (int i = 0; i < n; i += 32, in += 34) {
        const vf scale = splat(half_at(in));
        for (int j = 0; j < 32; j += LANES) {
            store(out + i + j, scale * to_float(load_bytes(in + 2 + j)));
        }
    }
}

static void q8_0_to_bytes(struct byte_row * out, const char * in, int n) {
    for (int b = 0; b < n / 32; b++, in += 34) {
        out->scale[b] = half_at(in);
        out->min[b] = 0.0f;
        for (int j = 0; j < 32; j += 8) {
            uint64_t q;
            memcpy(&q, in + 2 + j, 8);
            q ^= BYTE_OFFSET * 0x0101010101010101u; /* an offset of 128 turns the top bit */
            memcpy(out->q + b * 32 + j, &q, 8);
        }
    }
}

/* Q4_K: float16 scale and minimum, 12 bytes of 6-bit scales and minima (ggml-quants.c, get_scale_min_k4), 128 of
 * nibbles. Q5_K: 32 bytes of fifth bits before those. */
INLINE void k_to_bytes(struct byte_row * out, const char * in, int n, const int fifth) {
    const uint8_t * block = (const uint8_t *) in;
    (void) n; /* DEPTH: the inputs are whole blocks */
    const float d = half_at(block), dmin = half_at(block + 2) / BYTE_UNIT;
    const uint8_t *packed = block + 4, *high = block + 16, *low = block + (fifth ? 48 : 16);
    for (int j = 0; j < 8; j++) {
        const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
        const int min = j < 4 ? packed[j + 4] & 63 : (packed[j + 4] >> 4) | (packed[j] >> 6 << 4);
        out->scale[j] = d * (float) scale;
        out->min[j] = dmin * (float) min;
    }
    for (int j = 0; j < 8; j += 2, low += 32) {
        uint8_t * q = out->q + 32 * j;
        for (int l = 0; l < 32; l++) {
            q[l] = (uint8_t) (low[l] & 15) | (fifth ? (uint8_t) ((high[l] >> j & 1) << 4) : 0);
        }
        for (int l = 0; l < 32; l++) {
            q[32 + l] = (uint8_t) (low[l] >> 4) | (fifth ? (uint8_t) ((high[l] >> (j + 1) & 1) << 4) : 0);
        }
    }
}

static void q4_k_to_bytes(struct byte_row * out, const char * in, int n) { k_to_bytes(out, in, n, 0); }
static void q5_k_to_bytes(struct byte_row * out, const char * in, int n) { k_to_bytes(out, in, n, 1); }

/* Q6_K: 128 bytes of low nibbles, 64 of upper pairs of bits, 16 int8 scales, a float16 scale of these. */
static void q6_k_to_float(float * out, const char * in, int n) {
    for (int i = 0; i < n; i += 256, in += 210) {
        const uint8_t *low = (const uint8_t *) in, *high = low + 128;
        const int8_t * scales = (const int8_t *) in + 192;
        const float d = half_at(in + 208);
        for (int j = 0; j < 16; j++) { /* 16 values each */
            const uint8_t *nibbles = low + j / 8 * 64 + j % 4 * 16, *pairs = high + j / 8 * 32 + j % 2 * 16;
            const int shift = j / 4 % 2 * 4, upper = j / 2 % 4 * 2;
            const float scale = d * (float) scales[j];
            for (int l = 0; l < 16; l++) {
                const int q = (nibbles[l] >> shift & 15) | (pairs[l] >> upper & 3) << 4;
                out[i + j * 16 + l] = scale * (float) (q - 32);
            }
        }
    }
}

/* How a type of weights is multiplied. */
struct weight_type {
    int type;
    int block, block_bytes;
    void (*to_float)(float * out, const char * in, int n);
    void (*to_bytes)(struct byte_row * out, const char * in, int n);
    int flush; /* with bytes: steps whose sums fit 16 bits, 2 * flush * 128 * largest q < 2^15; 0: no minimum */
};

static const struct weight_type * weight_type(int type) {
    static const struct weight_type known[] = {
        { GGML_TYPE_F32, 1, 4, f32_to_float, NULL, 0 },
        { GGML_TYPE_F16, 1, 2, f16_to_float, NULL, 0 },
        { GGML_TYPE_BF16, 1, 2, bf16_to_float, NULL, 0 },
        { GGML_TYPE_Q8_0, 32, 34, q8_0_to_float, BYTE_SUMS_16 ? NULL : q8_0_to_bytes, 0 },
        { GGML_TYPE_Q4_K, 256, 144, NULL, q4_k_to_bytes, 8 },
        { GGML_TYPE_Q5_K, 256, 176, NULL, q5_k_to_bytes, 4 },
        { GGML_TYPE_Q6_K, 256, 210, q6_k_to_float, NULL, 0 },
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].type == type) {
            return &known[i];
        }
    }
    return NULL;
}

static int takes(int type) {
    const struct weight_type * found = weight_type(type);
    return found == NULL ? 0 : found->to_bytes != NULL ? QVL_BYTES : QVL_WIDE;
}

#define WIDE_DEPTH_BYTES (DEPTH / WIDE_BLOCK * WIDE_PANEL_BYTES)
#define BYTE_DEPTH_BYTES (DEPTH / BYTE_BLOCK * BYTE_PANEL_BYTES)
#define PANEL_BYTES (WIDE_DEPTH_BYTES > BYTE_DEPTH_BYTES ? WIDE_DEPTH_BYTES : BYTE_DEPTH_BYTES)

/* Rows [first, first + rows) and inputs [k, k + n) of W to a panel of bytes or a wide one; rows past the end are 0. */
static void pack_weights(char * panel, const struct weight_type * kind, int bytes, const struct ggml_tensor * w,
                         int64_t first, int rows, int64_t k, int n) {
    union {
        struct wide wide[PANEL][DEPTH / WIDE_BLOCK];
        struct byte_row bytes[PANEL];
    } packed;
    float values[DEPTH];
    for (int i = 0; i < PANEL; i++) {
        const char * row = (const char *) w->data + (first + i) * (int64_t) w->nb[1] + k / kind->block * kind->block_bytes;
        if (i >= rows) {
            memset(bytes ? (void *) &packed.bytes[i] : (void *) packed.wide[i], 0,
                   bytes ? sizeof packed.bytes[i] : sizeof packed.wide[i]);
        } else if (bytes) {
            kind->to_bytes(&packed.bytes[i], row, n);
        } else {
            kind->to_float(values, row, n);
            put_wide_row(packed.wide[i], values, n);
        }
    }
    if (!bytes) {
        pack_wide(panel, packed.wide[0], DEPTH / WIDE_BLOCK, (n + WIDE_BLOCK - 1) / WIDE_BLOCK, VECTORS);
        return;
    }
    for (int b = 0; b < n / BYTE_BLOCK; b++) {
        float * scales = (float *) (panel + b * BYTE_PANEL_BYTES);
        for (int i = 0; i < PANEL; i++) {
            scales[i] = packed.bytes[i].scale[b];
            scales[PANEL + i] = packed.bytes[i].min[b];
        }
    }
    pack_bytes(panel, packed.bytes[0].q, sizeof packed.bytes[0], n);
}
