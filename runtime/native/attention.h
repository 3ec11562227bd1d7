/* Attention within segments: softmax(scale * q k^T) v.
 *
 * Keys and values are packed once per head and task, as panels of the wide product; queries and the softmax's
 * weights are its columns. Queries come in groups of QUERIES, whose scores stay in L1 and for which a panel is
 * read from L2 once; keys in blocks of KEYS, whose panels stay in L2. The softmax is the online one (arXiv
 * 1805.02867), in float32; its weights are rounded to integers with a scale for each block of keys.
 */
#pragma once

#include "product.h"

enum {
    KEYS = 256,       /* keys at a time */
    KEY_BLOCKS = KEYS / WIDE_BLOCK,
    QUERIES = 4 * ROWS,
    CHUNK_MIN = 192,  /* queries a task takes: enough that packing pays, */
    CHUNK_MAX = 1026, /* and few enough that their sums stay in L2 */
    MAX_DIM = 128,    /* the widest head */
    MAX_BLOCKS = MAX_DIM / WIDE_BLOCK,
    WEIGHT_LIMIT = 5700, /* the largest weight, below WIDE_LIMIT */
};

#define WEIGHT_LOG2 12.4767464f /* of WEIGHT_LIMIT */

/* One head of one segment, packed; n_pad is n rounded up to WIDE_BLOCK. */
struct head {
    int64_t n, n_pad;
    int dim, blocks, panels; /* of a row: values, wide blocks, panels that hold it */
    char * k;                /* [n_pad / PANEL][blocks] panels of keys */
    char * v;                /* [panels][n_pad / WIDE_BLOCK] panels of dimensions, whose inputs are keys */
};

static void pack_keys(const struct head * h, const char * k, int64_t stride) {
    struct wide rows[PANEL][MAX_BLOCKS];
    for (int64_t first = 0; first < h->n_pad; first += PANEL) {
        for (int i = 0; i < PANEL; i++) {
            if (first + i < h->n) {
                fetch(k + (first + i + AHEAD) * stride, h->dim * 4, 0);
                put_wide_row(rows[i], (const float *) (k + (first + i) * stride), h->dim);
            } else {
                memset(rows[i], 0, sizeof rows[i]);
            }
        }
        pack_wide(h->k + first / PANEL * h->blocks * WIDE_PANEL_BYTES, rows[0], MAX_BLOCKS, h->blocks, VECTORS);
    }
}

/* WIDE_BLOCK keys at a time, transposed so that a dimension's values of them lie together. */
static void pack_values(const struct head * h, const char * v, int64_t stride) {
    float part[WIDE_BLOCK][PANEL], turned[PANEL][WIDE_BLOCK];
    struct wide rows[PANEL];
    for (int64_t first = 0; first < h->n_pad; first += WIDE_BLOCK) {
        for (int p = 0; p < h->panels; p++) {
            const int n = h->dim - p * PANEL < PANEL ? h->dim - p * PANEL : PANEL;
            memset(part, 0, sizeof part);
            for (int j = 0; j < WIDE_BLOCK && first + j < h->n; j++) {
                fetch(v + (first + j + AHEAD) * stride + p * PANEL * 4, n * 4, 0);
                memcpy(part[j], v + (first + j) * stride + p * PANEL * 4, (size_t) n * 4);
            }
            for (int j = 0; j < WIDE_BLOCK; j += LANES) {
                pack_steps((char *) &turned[0][j], WIDE_BLOCK, (const char *) part[j], sizeof part[j], PANEL);
            }
            for (int i = 0; i < PANEL; i++) {
                put_wide(&rows[i], turned[i]);
            }
            const int vectors = (n + LANES - 1) / LANES;
            char * out = h->v + (p * (h->n_pad / WIDE_BLOCK) + first / WIDE_BLOCK) * WIDE_PANEL_BYTES;
            pack_wide(out, rows, 1, 1, vectors);
        }
    }
}

struct group {
    float out[QUERIES][MAX_DIM + PANEL];
    struct wide q[QUERIES][MAX_BLOCKS];
    float max[QUERIES], sum[QUERIES];
    int used; /* queries, up to a multiple of 2 * ROWS */
};

/* A query's scores with one block of keys to weights. Returns the sum of these; *alpha is the factor for what was
 * summed before, whose largest score was *max. */
INLINE float weights_of(struct wide * out, const float * scores, int width, float scale, float * max, float * alpha) {
    float best[KEY_BLOCKS + 1], power[KEY_BLOCKS + LANES] = { 0 }, now = *max;
    const int blocks = width / WIDE_BLOCK;
    for (int b = 0; b < blocks; b++) {
        vf top = load(scores + b * WIDE_BLOCK);
        for (int i = LANES; i < WIDE_BLOCK; i += LANES) {
            top = larger(top, load(scores + b * WIDE_BLOCK + i));
        }
        best[b] = across_max(top) * scale;
        now = fmaxf(now, best[b]);
    }
    best[blocks] = *max;
    *max = now;
    for (int b = 0; b <= blocks; b++) {
        power[b] = best[b] - now;
    }
    for (int i = 0; i <= KEY_BLOCKS; i += LANES) {
        store(power + i, exp2_of(load(power + i)));
    }
    *alpha = power[blocks];
    vf total = splat(0.0f);
    for (int b = 0; b < blocks; b++, out++, scores += WIDE_BLOCK) {
#if WIDE_INTEGER
        const float ratio = power[b] / WEIGHT_LIMIT, shift = best[b] - WEIGHT_LOG2;
        vi sum = splat_int(0);
        for (int i = 0; i < WIDE_BLOCK; i += LANES) {
            const vi q = nearest(rough_exp2(load(scores + i) * splat(scale) - splat(shift)));
            store_narrow(out->q + i, q);
            sum += q;
        }
        out->scale = ratio;
        total += to_float(sum) * splat(ratio);
#else
        float weights[WIDE_BLOCK];
        for (int i = 0; i < WIDE_BLOCK; i += LANES) {
            const vf p = exp2_of(load(scores + i) * splat(scale) - splat(now));
            store(weights + i, p);
            total += p; /* a key past the end counts 2^-126: nothing beside the largest weight's 1 */
        }
        put_wide(out, weights);
#endif
    }
    return across_sum(total);
}

/* sums += panel * columns for `used` columns; `vectors` is a constant, so that the sums are registers. */
INLINE void multiply_all(float * sums, int64_t stride, const char * panel, const struct wide * x, int64_t x_blocks,
                         int used, int n_in, const int add, const int vectors) {
    const int64_t x_stride = x_blocks * (int64_t) sizeof *x;
    const int rows = vectors * 2 <= VECTORS ? 2 * ROWS : ROWS; /* few registers of rows leave room for columns */
    for (int r = 0; r < used; r += rows) {
        multiply_wide(sums + r * stride, stride, panel, (const char *) x + r * x_stride, x_stride, n_in, add, vectors,
                      rows);
    }
}

/* One block of keys for one group of queries. */
static void attend_block(struct group * g, const struct head * h, int64_t first, float scale) {
    float s[QUERIES][KEYS];
    struct wide p[QUERIES][KEY_BLOCKS];
    const int width = (int) (h->n_pad - first < KEYS ? h->n_pad - first : KEYS);
    const int valid = (int) (h->n - first < width ? h->n - first : width);

    for (int c = 0; c < width; c += PANEL) {
        const char * keys = h->k + (first + c) / PANEL * h->blocks * WIDE_PANEL_BYTES;
        multiply_all(&s[0][c], KEYS, keys, g->q[0], MAX_BLOCKS, g->used, h->dim, 0, VECTORS);
    }
    for (int r = 0; r < g->used; r++) {
        for (int i = valid; i < width; i++) {
            s[r][i] = -INFINITY;
        }
        float alpha;
        const float sum = weights_of(p[r], s[r], width, scale, &g->max[r], &alpha);
        g->sum[r] = g->sum[r] * alpha + sum;
        for (int i = 0; i < h->panels * PANEL; i += LANES) {
            store(g->out[r] + i, load(g->out[r] + i) * splat(alpha));
        }
    }
    for (int i = 0; i < h->panels; i++) {
        const char * values = h->v + (i * (h->n_pad / WIDE_BLOCK) + first / WIDE_BLOCK) * WIDE_PANEL_BYTES;
        float * out = g->out[0] + i * PANEL;
        const int64_t stride = MAX_DIM + PANEL;
        switch ((h->dim - i * PANEL + LANES - 1) / LANES) {
            case 1: multiply_all(out, stride, values, p[0], KEY_BLOCKS, g->used, width, 1, 1); break;
#if VECTORS > 2
            case 2: multiply_all(out, stride, values, p[0], KEY_BLOCKS, g->used, width, 1, 2); break;
#endif
#if VECTORS > 3
            case 3: multiply_all(out, stride, values, p[0], KEY_BLOCKS, g->used, width, 1, 3); break;
#endif
            default: multiply_all(out, stride, values, p[0], KEY_BLOCKS, g->used, width, 1, VECTORS); break;
        }
    }
}

/* Queries [start, end) of one head of one segment that begins at patch `base`. Queries of another number than keys
 * see all keys. */
static int attend(const struct ggml_tensor * dst, int64_t base, int64_t size, int head_index, int64_t start,
                  int64_t end, float scale) {
    const struct ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
    const int cross = q->ne[2] != k->ne[2];
    const int64_t n = cross ? k->ne[2] : size, key = cross ? 0 : base;
    struct head h = { .n = n, .n_pad = (n + WIDE_BLOCK - 1) / WIDE_BLOCK * WIDE_BLOCK, .dim = (int) q->ne[0] };
    h.blocks = (h.dim + WIDE_BLOCK - 1) / WIDE_BLOCK;
    h.panels = (h.dim + PANEL - 1) / PANEL;
    const int64_t k_bytes = h.n_pad / PANEL * h.blocks * WIDE_PANEL_BYTES;
    const int64_t v_bytes = h.n_pad / WIDE_BLOCK * h.panels * WIDE_PANEL_BYTES;
    const int n_groups = (int) ((end - start + QUERIES - 1) / QUERIES);
    void * memory;
    h.k = allocate((size_t) (k_bytes + v_bytes) + (size_t) n_groups * sizeof(struct group), &memory);
    if (h.k == NULL) {
        return -1;
    }
    h.v = h.k + k_bytes;
    struct group * groups = (struct group *) (h.v + v_bytes);

    pack_keys(&h, (const char *) k->data + head_index * (int64_t) k->nb[1] + key * (int64_t) k->nb[2], (int64_t) k->nb[2]);
    pack_values(&h, (const char *) v->data + head_index * (int64_t) v->nb[1] + key * (int64_t) v->nb[2], (int64_t) v->nb[2]);
    memset(groups, 0, (size_t) n_groups * sizeof *groups);
    for (int64_t i = 0; i < (int64_t) n_groups * QUERIES; i++) {
        struct group * g = &groups[i / QUERIES];
        g->max[i % QUERIES] = -INFINITY;
        if (start + i < end) {
            g->used = (int) (i % QUERIES / (2 * ROWS) + 1) * 2 * ROWS;
            const char * query = (const char *) q->data + head_index * (int64_t) q->nb[1] + (base + start + i) * (int64_t) q->nb[2];
            put_wide_row(g->q[i % QUERIES], (const float *) query, h.dim);
        }
    }
    for (int64_t first = 0; first < h.n_pad; first += KEYS) {
        for (int i = 0; i < n_groups; i++) {
            attend_block(&groups[i], &h, first, scale);
        }
    }
    for (int64_t i = 0; i < end - start; i++) {
        const struct group * g = &groups[i / QUERIES];
        const float inverse = 1.0f / g->sum[i % QUERIES];
        float * out = (float *) ((char *) dst->data + (base + start + i) * (int64_t) dst->nb[1]) + (int64_t) head_index * h.dim;
        for (int d = 0; d < h.dim; d++) {
            out[d] = g->out[i % QUERIES][d] * inverse;
        }
    }
    free(memory);
    return 0;
}

/* Queries of a task: `most` at most, in equal parts, since a short one packs the keys and values as well. */
static int64_t chunk_size(int64_t size, int64_t most) {
    const int64_t parts = (size + most - 1) / most;
    return (size + parts * ROWS - 1) / (parts * ROWS) * ROWS;
}

/* ggml_custom_op_t. src: q float32 [head_dim, n_head, n], k and v as q or with another number of
 * rows; dst: float32 [head_dim * n_head, n]. */
static void attention(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
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
            if (attend(dst, base + at / parts / n_head * size, size, (int) (at / parts % n_head), start, end, scale) != 0) {
                params->failed = 1;
            }
        }
        before += n;
        base += count * size;
    }
}
