/* Linear layers: act(W x + bias), to which a tensor is added or by which it is multiplied.
 *
 * Weights stay in the file's type, mapped. DEPTH inputs of a tile's rows at a time are packed into the panels that
 * the product reads, which fit L1 or nearly so; every column's DEPTH inputs are then read once for all rows of the
 * tile. Activation, residual and the rounding for the next layer follow while the tile's sums are in L2.
 */
#pragma once

#include "weights.h"

enum {
    TILE = 64,     /* rows of W whose sums are kept: whole blocks of the next layer's input */
    COLUMNS = 768, /* columns of x whose sums for a tile fit L2 */
};

/* The sums of ROWS columns for one panel, over n inputs. */
INLINE void multiply(float * sums, const char * panel, const struct weight_type * kind, const char * x,
                     int64_t x_stride, int n) {
    if (!kind->to_bytes) {
        multiply_wide(sums, TILE, panel, x, x_stride, n, 1, VECTORS);
    } else if (kind->flush == 0) {
#if !BYTE_SUMS_16
        multiply_bytes(sums, TILE, panel, x, x_stride, n, 0, BYTE_STEPS);
#endif
    } else if (kind->flush == 8) {
        multiply_bytes(sums, TILE, panel, x, x_stride, n, 1, 8);
    } else {
        multiply_bytes(sums, TILE, panel, x, x_stride, n, 1, 4);
    }
}

/* One column's sums to where they belong. */
static void finish(struct ggml_tensor * dst, const float * sums, int64_t column, int64_t first, int rows, int choice) {
    const struct ggml_tensor *bias = dst->src[2], *other = dst->src[3];
    float y[TILE], b[TILE] = { 0 }, o[TILE] = { 0 };
    if (bias != NULL) {
        memcpy(b, (const float *) bias->data + first, (size_t) rows * 4);
    }
    if (other != NULL) {
        memcpy(o, (const char *) other->data + column * (int64_t) other->nb[1] + first * 4, (size_t) rows * 4);
    }
    for (int i = 0; i < TILE; i += LANES) {
        const vf x = activate(load(sums + i) + load(b + i), QVL_FIRST(choice));
        store(y + i, other == NULL ? x : QVL_SECOND(choice) == QVL_MULTIPLY ? x * load(o + i) : x + load(o + i));
    }
    put((char *) dst->data + column * (int64_t) dst->nb[1], QVL_FORMAT(choice), first, y, rows);
}

/* Rows [first, first + rows) of the result for columns [start, end). */
static void tile(struct ggml_tensor * dst, char * memory, int64_t start, int64_t end, int64_t first, int rows,
                 int choice) {
    const struct ggml_tensor *w = dst->src[0], *x = dst->src[1];
    const struct weight_type * kind = weight_type(w->type);
    const int format = takes(w->type);
    const int64_t n_in = w->ne[0], n = end - start, x_stride = (int64_t) x->nb[1];
    const int64_t row = row_bytes(format, DEPTH);
    char * panels = memory;
    char * tail = panels + TILE / PANEL * PANEL_BYTES;
    float * sums = (float *) (tail + (ROWS * row + 63) / 64 * 64);
    memset(sums, 0, (size_t) (n + ROWS) * TILE * sizeof *sums);
    for (int64_t k = 0; k < n_in; k += DEPTH) {
        const int depth = n_in - k < DEPTH ? (int) (n_in - k) : DEPTH;
        for (int part = 0; part < rows; part += PANEL) {
            const int present = rows - part < PANEL ? rows - part : PANEL;
            pack_weights(panels + part / PANEL * PANEL_BYTES, kind, w, first + part, present, k, depth);
        }
        for (int64_t j = 0; j < n; j += ROWS) {
            const char * columns = (const char *) x->data + (start + j) * x_stride + row_bytes(format, k);
            int64_t stride = x_stride;
            if (n - j < ROWS) { /* the last columns, with zeros for those that are not there */
                memset(tail, 0, (size_t) (ROWS * row));
                for (int r = 0; r < n - j; r++) {
                    memcpy(tail + r * row, columns + r * stride, (size_t) row_bytes(format, depth));
                }
                columns = tail;
                stride = row;
            }
            for (int part = 0; part < rows; part += PANEL) {
                multiply(sums + j * TILE + part, panels + part / PANEL * PANEL_BYTES, kind, columns, stride, depth);
            }
        }
    }
    for (int64_t j = 0; j < n; j++) {
        finish(dst, sums + j * TILE, start + j, first, rows, choice);
    }
}

/* ggml_custom_op_t. src: W [n_in, n_out], x [row_bytes(takes(W), n_in), n], bias float32 [n_out] or none, and
 * perhaps a tensor float32 [n_out, n]; dst: [row_bytes(format, n_out), n]. */
static void linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) ith;
    struct qvl_params * params = userdata;
    const int64_t n_out = dst->src[0]->ne[1], n = dst->src[1]->ne[1];
    const int64_t blocks = (n + COLUMNS - 1) / COLUMNS, tiles = (n_out + TILE - 1) / TILE;
    const int64_t block = ((n + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    const int64_t row = row_bytes(takes(dst->src[0]->type), DEPTH);
    void * base;
    char * memory = allocate((size_t) (TILE / PANEL * PANEL_BYTES + ROWS * row + 64 + (COLUMNS + 2 * ROWS) * TILE * 4), &base);
    for (int64_t task; (task = qvl_next_task(params, blocks * tiles, nth)) >= 0;) {
        const int64_t start = task / tiles * block, first = task % tiles * TILE;
        if (memory == NULL) {
            params->failed = 1;
        } else if (start < n) {
            tile(dst, memory, start, start + block < n ? start + block : n, first,
                 n_out - first < TILE ? (int) (n_out - first) : TILE, params->choice);
        }
    }
    free(base);
}
