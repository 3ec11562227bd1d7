/* Attention within segments on CPUs with AVX512_BF16: softmax(scale * q k^T) v, as a ggml custom op.
 *
 * ggml's flash attention multiplies in float32 and packs every tile of keys anew for every tile of
 * queries. Here keys and values are packed once per head, in bfloat16, and multiplied with vdpbf16ps,
 * which does twice as many products an instruction. Scores, the softmax and all sums are float32.
 *
 * The blocks: queries in groups of ROWS, whose scores stay in L1; keys in blocks of KEYS, whose packed
 * keys and values stay in L2. The softmax is the online one (arXiv 1805.02867).
 */
#include "simd.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef QVL_AVX512_BF16

enum {
    ROWS = 6,            /* queries at a time */
    KEYS = 256,          /* keys at a time */
    GROUP = 64,          /* keys whose scores are held in registers: 4 of them */
    CHUNK_MIN = 192,     /* queries a task takes: enough that packing pays, */
    CHUNK_MAX = 1026,    /* and few enough that their sums stay in L2 */
    MAX_DIM = 80,        /* ROWS * MAX_DIM / LANES accumulators must fit the registers */
    MAX_PAIRS = MAX_DIM / 2,
};

/* One head of one segment, packed; n_pad is n rounded up to GROUP. */
struct head {
    int64_t n, n_pad;
    int pairs;           /* pairs of dimensions of q and k */
    int blocks;          /* registers that hold one row of v */
    uint16_t * k;        /* [n_pad / LANES][pairs][LANES][2] */
    uint16_t * v;        /* [n_pad / 2][blocks][LANES][2] */
};

TARGET static void pack_keys(struct head * h, const char * k, size_t stride, int dim) {
    uint16_t row[MAX_DIM];
    for (int64_t i = 0; i < h->n_pad; i++) {
        uint16_t * out = h->k + (i / LANES) * h->pairs * LANES * 2 + (i % LANES) * 2;
        if (i < h->n) {
            to_bf16(row, (const float *) (k + i * stride), dim, MAX_DIM);
        } else {
            memset(row, 0, sizeof row);
        }
        for (int p = 0; p < h->pairs; p++) {
            memcpy(out + p * LANES * 2, row + 2 * p, 4);
        }
    }
}

TARGET static void pack_values(struct head * h, const char * v, size_t stride, int dim) {
    const __m512i weave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    uint16_t row[2][MAX_DIM];
    for (int64_t i = 0; i < h->n_pad; i += 2) {
        for (int j = 0; j < 2; j++) {
            if (i + j < h->n) {
                to_bf16(row[j], (const float *) (v + (i + j) * stride), dim, MAX_DIM);
            } else {
                memset(row[j], 0, sizeof row[j]);
            }
        }
        for (int b = 0; b < h->blocks; b++) {
            const __m256i even = _mm256_loadu_si256((const __m256i *) (row[0] + b * LANES));
            const __m256i odd = _mm256_loadu_si256((const __m256i *) (row[1] + b * LANES));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
            _mm512_store_si512(h->v + ((i / 2) * h->blocks + b) * LANES * 2, _mm512_permutexvar_epi16(weave, both));
        }
    }
}

/* Scores of ROWS queries with GROUP keys. */
INLINE void score_group(float (*s)[KEYS], const uint32_t (*q)[MAX_PAIRS], const uint16_t * k, int pairs) {
    __m512 acc[ROWS][GROUP / LANES];
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < GROUP / LANES; c++) {
            acc[r][c] = _mm512_setzero_ps();
        }
    }
    for (int p = 0; p < pairs; p++) {
        __m512bh keys[GROUP / LANES];
        for (int c = 0; c < GROUP / LANES; c++) {
            keys[c] = as_bf16(_mm512_load_si512(k + ((int64_t) c * pairs + p) * LANES * 2));
        }
        for (int r = 0; r < ROWS; r++) {
            const __m512bh query = as_bf16(_mm512_set1_epi32((int) q[r][p]));
            for (int c = 0; c < GROUP / LANES; c++) {
                acc[r][c] = _mm512_dpbf16_ps(acc[r][c], keys[c], query);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < GROUP / LANES; c++) {
            _mm512_store_ps(s[r] + c * LANES, acc[r][c]);
        }
    }
}

/* out[r] = alpha[r] * out[r] + p[r] v over n_keys keys. */
INLINE void weigh(float (*out)[MAX_DIM], const float * alpha, const uint16_t (*p)[KEYS], const uint16_t * v,
                  int n_keys, const int blocks) {
    __m512 acc[ROWS][MAX_DIM / LANES];
    for (int r = 0; r < ROWS; r++) {
        for (int b = 0; b < blocks; b++) {
            acc[r][b] = _mm512_mul_ps(_mm512_load_ps(out[r] + b * LANES), _mm512_set1_ps(alpha[r]));
        }
    }
    for (int j = 0; j < n_keys / 2; j++) {
        __m512bh values[MAX_DIM / LANES];
        for (int b = 0; b < blocks; b++) {
            values[b] = as_bf16(_mm512_load_si512(v + ((int64_t) j * blocks + b) * LANES * 2));
        }
        for (int r = 0; r < ROWS; r++) {
            int both;
            memcpy(&both, p[r] + 2 * j, 4);
            const __m512bh weight = as_bf16(_mm512_set1_epi32(both));
            for (int b = 0; b < blocks; b++) {
                acc[r][b] = _mm512_dpbf16_ps(acc[r][b], values[b], weight);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int b = 0; b < blocks; b++) {
            _mm512_store_ps(out[r] + b * LANES, acc[r][b]);
        }
    }
}

struct group {
    _Alignas(64) float out[ROWS][MAX_DIM];
    uint32_t q[ROWS][MAX_PAIRS];
    float max[ROWS], sum[ROWS];
};

/* One block of keys for one group of queries. */
TARGET static void attend_block(struct group * g, const struct head * h, int64_t first, float scale) {
    _Alignas(64) float s[ROWS][KEYS];
    _Alignas(64) uint16_t p[ROWS][KEYS];
    float alpha[ROWS];
    const int64_t left = h->n_pad - first;
    const int width = (int) (left < KEYS ? left : KEYS);
    const int valid = (int) (h->n - first < width ? h->n - first : width);

    for (int c = 0; c < width; c += GROUP) {
        const uint16_t * keys = h->k + ((first + c) / LANES) * h->pairs * LANES * 2;
        score_group((float (*)[KEYS]) &s[0][c], (const uint32_t (*)[MAX_PAIRS]) g->q, keys, h->pairs);
    }
    for (int r = 0; r < ROWS; r++) {
        for (int i = valid; i < width; i++) {
            s[r][i] = -INFINITY;
        }
        __m512 top = _mm512_load_ps(s[r]);
        for (int i = LANES; i < width; i += LANES) {
            top = _mm512_max_ps(top, _mm512_load_ps(s[r] + i));
        }
        const float now = fmaxf(g->max[r], _mm512_reduce_max_ps(top) * scale);
        alpha[r] = exp2f(g->max[r] - now);
        g->max[r] = now;

        const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(now);
        __m512 total = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 2 * LANES) {
            const __m512 a = exp2_falling(_mm512_fmsub_ps(_mm512_load_ps(s[r] + i), factor, shift));
            const __m512 b = exp2_falling(_mm512_fmsub_ps(_mm512_load_ps(s[r] + i + LANES), factor, shift));
            total = _mm512_add_ps(total, _mm512_add_ps(a, b));
            _mm512_store_si512(p[r] + i, (__m512i) _mm512_cvtne2ps_pbh(b, a));
        }
        /* what is past the end counts 2^-126 each: nothing in float32 beside the maximum's 1 */
        g->sum[r] = g->sum[r] * alpha[r] + _mm512_reduce_add_ps(total);
    }
    const uint16_t * values = h->v + (first / 2) * h->blocks * LANES * 2;
    const uint16_t (*weights)[KEYS] = (const uint16_t (*)[KEYS]) p;
    switch (h->blocks) { /* a constant each, so that the accumulators are registers */
        case 1: weigh(g->out, alpha, weights, values, width, 1); break;
        case 2: weigh(g->out, alpha, weights, values, width, 2); break;
        case 3: weigh(g->out, alpha, weights, values, width, 3); break;
        case 4: weigh(g->out, alpha, weights, values, width, 4); break;
        default: weigh(g->out, alpha, weights, values, width, 5); break;
    }
}

TARGET static void load_queries(struct group * g, const char * q, size_t stride, int rows, int dim) {
    memset(g, 0, sizeof *g);
    for (int r = 0; r < ROWS; r++) {
        g->max[r] = -INFINITY;
        if (r < rows) {
            to_bf16((uint16_t *) g->q[r], (const float *) (q + r * stride), dim, MAX_DIM);
        }
    }
}

/* Queries [start, end) of one head of one segment that begins at patch `base`. */
TARGET static int attend(const struct ggml_tensor * dst, int64_t base, int64_t size, int head_index, int64_t start,
                         int64_t end, float scale) {
    const struct ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
    const int dim = (int) q->ne[0];
    struct head h = { .n = size, .n_pad = (size + GROUP - 1) / GROUP * GROUP };
    h.pairs = (dim + 1) / 2;
    h.blocks = (dim + LANES - 1) / LANES;
    const size_t k_bytes = (size_t) h.n_pad * h.pairs * 4, v_bytes = (size_t) h.n_pad * h.blocks * LANES * 2;
    const int n_groups = (int) ((end - start + ROWS - 1) / ROWS);
    char * memory = aligned_alloc(64, (k_bytes + v_bytes + n_groups * sizeof(struct group) + 63) / 64 * 64);
    if (memory == NULL) {
        return -1;
    }
    h.k = (uint16_t *) memory;
    h.v = (uint16_t *) (memory + k_bytes);
    struct group * groups = (struct group *) (memory + k_bytes + v_bytes);

    pack_keys(&h, (const char *) k->data + head_index * k->nb[1] + base * k->nb[2], k->nb[2], dim);
    pack_values(&h, (const char *) v->data + head_index * v->nb[1] + base * v->nb[2], v->nb[2], dim);
    const char * queries = (const char *) q->data + head_index * q->nb[1] + (base + start) * q->nb[2];
    for (int i = 0; i < n_groups; i++) {
        const int64_t left = end - start - (int64_t) i * ROWS;
        load_queries(&groups[i], queries + (int64_t) i * ROWS * q->nb[2], q->nb[2], left < ROWS ? (int) left : ROWS, dim);
    }
    for (int64_t first = 0; first < h.n_pad; first += KEYS) {
        for (int i = 0; i < n_groups; i++) {
            attend_block(&groups[i], &h, first, scale);
        }
    }
    for (int64_t i = 0; i < end - start; i++) {
        const struct group * g = &groups[i / ROWS];
        const __m512 inverse = _mm512_set1_ps(1.0f / g->sum[i % ROWS]);
        char * out = (char *) dst->data + (base + start + i) * dst->nb[1] + (size_t) head_index * dim * dst->nb[0];
        for (int d = 0; d < dim; d += LANES) {
            const __mmask16 mask = dim - d >= LANES ? 0xffff : (__mmask16) ((1u << (dim - d)) - 1);
            const __m512 x = _mm512_mul_ps(_mm512_load_ps(g->out[i % ROWS] + d), inverse);
            if (dst->type == GGML_TYPE_BF16) {
                _mm256_mask_storeu_epi16((uint16_t *) out + d, mask, (__m256i) _mm512_cvtneps_pbh(x));
            } else {
                _mm512_mask_storeu_ps((float *) out + d, mask, x);
            }
        }
    }
    free(memory);
    return 0;
}

/* Widest head that the registers hold; 0 where the CPU lacks the instructions. */
QVL_EXPORT int qvl_attention_max_head(void) { return qvl_has_avx512_bf16() ? MAX_DIM : 0; }

/* Queries of a task: `most` at most, in equal parts, since a short one packs the keys and values as well. */
static int64_t chunk_size(int64_t size, int64_t most) {
    const int64_t parts = (size + most - 1) / most;
    return (size + parts * ROWS - 1) / (parts * ROWS) * ROWS;
}

/* ggml_custom_op_t. src: q, k, v, each float32 [head_dim, n_head, n]; dst: float32 or
 * bfloat16 [head_dim * n_head, n]. */
QVL_EXPORT void qvl_attention(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) ith;
    struct qvl_params * params = userdata;
    const float scale = params->scalar * 1.44269504f; /* log2(e) */
    const int n_head = (int) dst->src[0]->ne[1];
    /* four tasks a thread even out the work */
    const int64_t share = n_head * dst->ne[1] / (4 * nth);
    const int64_t most = share < CHUNK_MIN ? CHUNK_MIN : share > CHUNK_MAX ? CHUNK_MAX : share;
    int64_t n_tasks = 0, base = 0, before = 0;
    for (int i = 0; i < params->choice; i++) {
        const int64_t size = params->runs[i].size, chunk = chunk_size(size, most);
        n_tasks += params->runs[i].count * n_head * ((size + chunk - 1) / chunk);
    }
    int64_t task = qvl_next_task(params, n_tasks, nth);
    for (int i = 0; i < params->choice; i++) {
        const int64_t count = params->runs[i].count, size = params->runs[i].size, chunk = chunk_size(size, most);
        const int64_t parts = (size + chunk - 1) / chunk, n = count * n_head * parts;
        for (; task >= 0 && task < before + n; task = qvl_next_task(params, n_tasks, nth)) {
            const int64_t at = task - before, start = at % parts * chunk;
            const int64_t end = start + chunk < size ? start + chunk : size;
            if (attend(dst, base + at / parts / n_head * size, size, at / parts % n_head, start, end, scale) != 0) {
                params->failed = 1;
            }
        }
        before += n;
        base += count * size;
    }
}

#else

QVL_EXPORT int qvl_attention_max_head(void) { return 0; }
QVL_EXPORT void qvl_attention(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) dst; (void) ith; (void) nth; (void) userdata;
}

#endif
