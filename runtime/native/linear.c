/* Linear layers on CPUs with AVX512_BF16: act(W x + bias) + residual, and layer norm, as ggml custom ops.
 *
 * Weights stay in the file's type, mapped: a panel of them at a time is turned to bfloat16 in the order
 * the multiplication reads it, which costs little beside multiplying it with hundreds of columns. The
 * activations are bfloat16, sums are float32, and what follows the product (bias, SiLU, residual, rounding
 * for the next layer) happens while its tile is at hand.
 */
#include "simd.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef QVL_AVX512_BF16

enum {
    ROWS = 6,      /* columns of x at a time */
    PANEL = 64,    /* rows of W at a time: 4 registers of sums for each column */
    DEPTH = 256,   /* inputs at a time: a packed panel of them fits L1 */
    COLUMNS = 768, /* columns of x whose sums for a panel fit L2 */
    VECTORS = PANEL / LANES,
};

/* 16 rows of 16 pairs to 16 pairs of 16 rows: a transposition of 32-bit values. */
TARGET static void transpose16(uint16_t * out, size_t out_stride, const uint16_t * in, size_t in_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) {
        r[i] = _mm512_loadu_si512(in + i * in_stride);
    }
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_store_si512(out + i * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_store_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}

/* 16 values scale * q + shift, q unsigned, to bfloat16. */
INLINE void store_scaled(uint16_t * out, __m512i q, float scale, float shift) {
    const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale), _mm512_set1_ps(shift));
    _mm256_storeu_si256((__m256i *) out, (__m256i) _mm512_cvtneps_pbh(x));
}

INLINE __m512i load_bytes(const uint8_t * p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)); }

INLINE __m512i load_32_bytes(const uint8_t * p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *) p));
}

INLINE float half_at(const uint8_t * p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16((short) bits)));
}

/* Q8_0: blocks of 32, a float16 scale and 32 int8. */
TARGET static void q8_0_to_bf16(uint16_t * out, const char * block, int n) {
    for (int i = 0; i < n; i += 32, block += 34) {
        const float scale = half_at((const uint8_t *) block);
        for (int half = 0; half < 32; half += LANES) {
            const __m128i q = _mm_loadu_si128((const __m128i *) (block + 2 + half));
            store_scaled(out + i + half, _mm512_cvtepi8_epi32(q), scale, 0.0f);
        }
    }
}

/* The 6-bit scale and minimum of sub-block j of Q4_K and Q5_K (ggml-quants.c, get_scale_min_k4). */
INLINE void scale_and_min(const uint8_t * packed, int j, int * scale, int * min) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *min = packed[j + 4] & 63;
    } else {
        *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
        *min = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4);
    }
}

/* Q4_K: float16 scale and minimum, 12 bytes of scales, 128 of nibbles. Q5_K: 32 bytes of fifth bits before those.
 * A sub-block has 16 or 32 different values: they are worked out once, and looked up. */
INLINE void q45_k_to_bf16(uint16_t * out, const uint8_t * block, const int fifth) {
    const float d = half_at(block), dmin = half_at(block + 2);
    const uint8_t *scales = block + 4, *high = block + 16, *low = block + (fifth ? 48 : 16);
    const __m512 first = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 second = _mm512_add_ps(first, _mm512_set1_ps(16.0f));
    for (int j = 0; j < 8; j++) {
        int scale, min;
        scale_and_min(scales, j, &scale, &min);
        const __m512 step = _mm512_set1_ps(d * (float) scale), shift = _mm512_set1_ps(-dmin * (float) min);
        const __m512 upper = fifth ? _mm512_fmadd_ps(second, step, shift) : shift;
        const __m512bh values = _mm512_cvtne2ps_pbh(upper, _mm512_fmadd_ps(first, step, shift));
        __m512i q = load_32_bytes(low + j / 2 * 32);
        q = _mm512_and_si512(j % 2 ? _mm512_srli_epi16(q, 4) : q, _mm512_set1_epi16(15));
        if (fifth) {
            const __m512i bit = _mm512_srl_epi16(load_32_bytes(high), _mm_cvtsi32_si128(j));
            q = _mm512_or_si512(q, _mm512_slli_epi16(_mm512_and_si512(bit, _mm512_set1_epi16(1)), 4));
        }
        _mm512_storeu_si512(out + j * 32, _mm512_permutexvar_epi16(q, (__m512i) values));
    }
}

TARGET static void q4_k_to_bf16(uint16_t * out, const uint8_t * block) { q45_k_to_bf16(out, block, 0); }
TARGET static void q5_k_to_bf16(uint16_t * out, const uint8_t * block) { q45_k_to_bf16(out, block, 1); }

/* Q6_K: 128 bytes of low nibbles, 64 of upper pairs of bits, 16 int8 scales, a float16 scale of these. */
TARGET static void q6_k_to_bf16(uint16_t * out, const uint8_t * block) {
    const uint8_t *low = block, *high = block + 128;
    const int8_t * scales = (const int8_t *) (block + 192);
    const float d = half_at(block + 208);
    for (int part = 0; part < 256; part += 128, low += 64, high += 32, scales += 8) {
        for (int j = 0; j < 4; j++) { /* 32 values each */
            for (int i = 0; i < 32; i += LANES) {
                const __m512i nibbles = load_bytes(low + j % 2 * 32 + i), pairs = load_bytes(high + i);
                const __m512i lower = j < 2 ? nibbles : _mm512_srli_epi32(nibbles, 4);
                const __m512i upper = _mm512_srl_epi32(pairs, _mm_cvtsi32_si128(2 * j));
                const __m512i q = _mm512_or_si512(_mm512_and_si512(lower, _mm512_set1_epi32(15)),
                                                  _mm512_slli_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(3)), 4));
                const float scale = d * (float) scales[2 * j + i / LANES];
                store_scaled(out + part + j * 32 + i, q, scale, -32.0f * scale);
            }
        }
    }
}

/* The types with blocks of 256 (ggml-common.h). */
struct k_quant {
    int type;
    int64_t block_bytes;
    void (*to_bf16)(uint16_t * out, const uint8_t * block);
};

static const struct k_quant * k_quant(int type) {
    static const struct k_quant known[] = {
        { GGML_TYPE_Q4_K, 144, q4_k_to_bf16 },
        { GGML_TYPE_Q5_K, 176, q5_k_to_bf16 },
        { GGML_TYPE_Q6_K, 210, q6_k_to_bf16 },
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].type == type) {
            return &known[i];
        }
    }
    return NULL;
}

/* n values of a row of weights from value `first` on, as bfloat16; zeros up to DEPTH. */
TARGET static void weights_to_bf16(uint16_t * out, const char * row, int type, int64_t first, int n) {
    if (n < DEPTH) {
        memset(out, 0, DEPTH * sizeof *out);
    }
    if (type == GGML_TYPE_BF16) {
        memcpy(out, (const uint16_t *) row + first, n * sizeof *out);
    } else if (type == GGML_TYPE_F32) {
        to_bf16(out, (const float *) row + first, n, n);
    } else if (type == GGML_TYPE_F16) {
        const uint16_t * in = (const uint16_t *) row + first;
        for (int i = 0; i < n; i += LANES) {
            const __mmask16 mask = n - i >= LANES ? 0xffff : (__mmask16) ((1u << (n - i)) - 1);
            const __m512 x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + i));
            _mm256_mask_storeu_epi16(out + i, mask, (__m256i) _mm512_cvtneps_pbh(x));
        }
    } else if (type == GGML_TYPE_Q8_0) {
        q8_0_to_bf16(out, row + first / 32 * 34, n);
    } else { /* blocks of 256, which DEPTH is */
        const struct k_quant * kind = k_quant(type);
        kind->to_bf16(out, (const uint8_t *) row + first / DEPTH * kind->block_bytes);
    }
}

/* Rows [first, first + rows) and inputs [k, k + depth) of W, as [DEPTH / 2][PANEL][2]. */
TARGET static void pack_panel(uint16_t * out, uint16_t * rows_bf16, const struct ggml_tensor * w, int64_t first,
                              int rows, int64_t k, int depth) {
    for (int r = 0; r < PANEL; r++) {
        if (r < rows) {
            weights_to_bf16(rows_bf16 + r * DEPTH, (const char *) w->data + (first + r) * w->nb[1], w->type, k, depth);
        } else {
            memset(rows_bf16 + r * DEPTH, 0, DEPTH * sizeof *out);
        }
    }
    for (int c = 0; c < VECTORS; c++) {
        for (int p = 0; p < depth / 2; p += LANES) {
            transpose16(out + (p * VECTORS + c) * LANES * 2, (size_t) VECTORS * LANES * 2,
                        rows_bf16 + c * LANES * DEPTH + 2 * p, DEPTH);
        }
    }
}

/* sums[ROWS][PANEL] += packed panel * ROWS columns of x, over `pairs` pairs of inputs. */
TARGET static void multiply(float * sums, const uint16_t * panel, const uint16_t * x, size_t stride, int pairs) {
    __m512 acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < VECTORS; c++) {
            acc[r][c] = _mm512_load_ps(sums + r * PANEL + c * LANES);
        }
    }
    for (int p = 0; p < pairs; p++) {
        __m512bh w[VECTORS];
        for (int c = 0; c < VECTORS; c++) {
            w[c] = as_bf16(_mm512_load_si512(panel + (p * VECTORS + c) * LANES * 2));
        }
        for (int r = 0; r < ROWS; r++) {
            int both;
            memcpy(&both, x + r * stride + 2 * p, 4);
            const __m512bh value = as_bf16(_mm512_set1_epi32(both));
            for (int c = 0; c < VECTORS; c++) {
                acc[r][c] = _mm512_dpbf16_ps(acc[r][c], w[c], value);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < VECTORS; c++) {
            _mm512_store_ps(sums + r * PANEL + c * LANES, acc[r][c]);
        }
    }
}

INLINE __m512 silu(__m512 x) {
    const __m512 e = exp2_clamped(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

/* One column's sums to where they belong. */
INLINE void finish(struct ggml_tensor * dst, const float * sums, int64_t column, int64_t first, int rows, int act) {
    const struct ggml_tensor *bias = dst->src[2], *residual = dst->src[3];
    for (int c = 0; c < rows; c += LANES) {
        const __mmask16 mask = rows - c >= LANES ? 0xffff : (__mmask16) ((1u << (rows - c)) - 1);
        const int64_t at = first + c;
        __m512 x = _mm512_load_ps(sums + c);
        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, (const float *) bias->data + at));
        if (act == QVL_SILU) {
            x = silu(x);
        }
        if (residual != NULL) {
            const float * from = (const float *) ((const char *) residual->data + column * residual->nb[1]);
            x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, from + at));
        }
        if (dst->type == GGML_TYPE_BF16) {
            uint16_t * to = (uint16_t *) ((char *) dst->data + column * dst->nb[1]);
            _mm256_mask_storeu_epi16(to + at, mask, (__m256i) _mm512_cvtneps_pbh(x));
        } else {
            _mm512_mask_storeu_ps((float *) ((char *) dst->data + column * dst->nb[1]) + at, mask, x);
        }
    }
}

/* Rows [first, first + rows) of the result for columns [start, end). */
TARGET static void tile(struct ggml_tensor * dst, char * memory, int64_t start, int64_t end, int64_t first, int rows,
                        int act) {
    const struct ggml_tensor *w = dst->src[0], *x = dst->src[1];
    const int64_t n_in = w->ne[0], n = end - start;
    uint16_t * panel = (uint16_t *) memory;
    uint16_t * rows_bf16 = panel + PANEL * DEPTH;
    uint16_t * tail = rows_bf16 + PANEL * DEPTH;
    float * sums = (float *) (tail + ROWS * DEPTH);
    memset(sums, 0, (size_t) (n + ROWS) * PANEL * sizeof *sums);
    for (int64_t k = 0; k < n_in; k += DEPTH) {
        const int depth = n_in - k < DEPTH ? (int) (n_in - k) : DEPTH;
        pack_panel(panel, rows_bf16, w, first, rows, k, depth);
        for (int64_t j = 0; j < n; j += ROWS) {
            const uint16_t * columns = (const uint16_t *) ((const char *) x->data + (start + j) * x->nb[1]) + k;
            size_t stride = x->nb[1] / 2;
            if (n - j < ROWS) { /* the last columns, with zeros for those that are not there */
                memset(tail, 0, ROWS * DEPTH * sizeof *tail);
                for (int r = 0; r < n - j; r++) {
                    memcpy(tail + r * DEPTH, columns + r * stride, depth * sizeof *tail);
                }
                columns = tail;
                stride = DEPTH;
            }
            multiply(sums + j * PANEL, panel, columns, stride, depth / 2);
        }
    }
    for (int64_t j = 0; j < n; j++) {
        finish(dst, sums + j * PANEL, start + j, first, rows, act);
    }
}

/* Types of weights that the kernel takes. */
QVL_EXPORT int qvl_linear_takes(int type) {
    return qvl_has_avx512_bf16() &&
           (type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0 ||
            k_quant(type) != NULL);
}

/* ggml_custom_op_t. src: W [n_in, n_out], x bfloat16 [n_in, n], bias float32 [n_out], and perhaps a residual
 * float32 [n_out, n]; dst: float32 or bfloat16 [n_out, n]. n_in is even. */
QVL_EXPORT void qvl_linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) ith;
    struct qvl_params * params = userdata;
    const int64_t n_out = dst->ne[0], n = dst->ne[1];
    const int64_t blocks = (n + COLUMNS - 1) / COLUMNS, panels = (n_out + PANEL - 1) / PANEL;
    const int64_t block = ((n + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    const size_t bytes = (2 * PANEL + ROWS) * DEPTH * sizeof(uint16_t) + (COLUMNS + ROWS) * PANEL * sizeof(float);
    char * memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    for (int64_t task; (task = qvl_next_task(params, blocks * panels, nth)) >= 0;) {
        const int64_t start = task / panels * block, first = task % panels * PANEL;
        if (memory == NULL) {
            params->failed = 1;
        } else if (start < n) {
            tile(dst, memory, start, start + block < n ? start + block : n, first,
                 n_out - first < PANEL ? (int) (n_out - first) : PANEL, params->choice);
        }
    }
    free(memory);
}

/* ggml_custom_op_t. src: x float32 [n_in, n], weight and bias float32 [n_in]; dst: bfloat16 [n_in, n]. */
QVL_EXPORT TARGET void qvl_layer_norm(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct ggml_tensor * x = dst->src[0];
    const float *weight = dst->src[1]->data, *bias = dst->src[2]->data;
    const float eps = ((const struct qvl_params *) userdata)->scalar;
    const int64_t n_in = x->ne[0];
    for (int64_t column = ith; column < x->ne[1]; column += nth) {
        const float * in = (const float *) ((const char *) x->data + column * x->nb[1]);
        uint16_t * out = (uint16_t *) ((char *) dst->data + column * dst->nb[1]);
        __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < n_in; i += LANES) {
            const __mmask16 mask = n_in - i >= LANES ? 0xffff : (__mmask16) ((1u << (n_in - i)) - 1);
            total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, in + i));
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / (float) n_in);
        for (int64_t i = 0; i < n_in; i += LANES) {
            const __mmask16 mask = n_in - i >= LANES ? 0xffff : (__mmask16) ((1u << (n_in - i)) - 1);
            const __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, in + i), mean);
            squares = _mm512_fmadd_ps(d, d, squares);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float) n_in + eps));
        for (int64_t i = 0; i < n_in; i += LANES) {
            const __mmask16 mask = n_in - i >= LANES ? 0xffff : (__mmask16) ((1u << (n_in - i)) - 1);
            const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, in + i), mean), factor);
            const __m512 y = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(mask, weight + i), _mm512_maskz_loadu_ps(mask, bias + i));
            _mm256_mask_storeu_epi16(out + i, mask, (__m256i) _mm512_cvtneps_pbh(y));
        }
    }
}

#else

QVL_EXPORT int qvl_linear_takes(int type) { (void) type; return 0; }
QVL_EXPORT void qvl_linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) dst; (void) ith; (void) nth; (void) userdata;
}
QVL_EXPORT void qvl_layer_norm(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) dst; (void) ith; (void) nth; (void) userdata;
}

#endif
