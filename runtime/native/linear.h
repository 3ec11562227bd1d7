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

/* The format of x: the one that suits W's type best, unless the caller chose another that W has. */
static int format_of_x(const struct ggml_tensor * dst, int choice) {
    return QVL_INPUT(choice) ? QVL_INPUT(choice) : takes(dst->src[0]->type);
}

/* The sums of ROWS columns for one panel, over n inputs. */
INLINE void multiply(float * sums, const char * panel, const struct weight_type * kind, int format, const char * x,
                     int64_t x_stride, int n) {
    if (format == QVL_WIDE) {
        multiply_wide(sums, TILE, panel, x, x_stride, n, 1, VECTORS, ROWS);
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

/* Columns [start, start + n) of a tile's sums to where they belong. */
static void finish(struct ggml_tensor * dst, const float * sums, int64_t start, int64_t n, int64_t first, int rows,
                   int choice) {
    const struct ggml_tensor *bias = dst->src[2], *other = dst->src[3];
    const int format = QVL_FORMAT(choice), act = QVL_FIRST(choice), times = QVL_SECOND(choice) == QVL_MULTIPLY;
    const int64_t stride = (int64_t) dst->nb[1], other_stride = other == NULL ? 0 : (int64_t) other->nb[1];
    const int64_t width = row_bytes(format, rows);
    char * out = (char *) dst->data + start * stride;
    float y[TILE], b[TILE] = { 0 }, o[TILE] = { 0 };
    if (bias != NULL) {
        memcpy(b, (const float *) bias->data + first, (size_t) rows * 4);
    }
    for (int64_t j = 0; j < n; j++, sums += TILE, out += stride) {
        const float * beside = o;
        fetch(out + row_bytes(format, first) + AHEAD * stride, width, 1);
        if (other != NULL) {
            const char * at = (const char *) other->data + (start + j) * other_stride + first * 4;
            fetch(at + AHEAD * other_stride, rows * 4, 0);
            beside = (const float *) at;
            if (rows < TILE) {
                memcpy(o, at, (size_t) rows * 4);
                beside = o;
            }
        }
        for (int i = 0; i < TILE; i += LANES) {
            const vf x = activate(load(sums + i) + load(b + i), act);
            store(y + i, times ? x * load(beside + i) : x + load(beside + i));
        }
        put(out, format, first, y, rows);
    }
}

/* Rows [first, first + rows) of the result for columns [start, end). */
static void tile(struct ggml_tensor * dst, char * memory, int64_t start, int64_t end, int64_t first, int rows,
                 int choice) {
    const struct ggml_tensor *w = dst->src[0], *x = dst->src[1];
    const struct weight_type * kind = weight_type(w->type);
    const int format = format_of_x(dst, choice);
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
            pack_weights(panels + part / PANEL * PANEL_BYTES, kind, format == QVL_BYTES, w, first + part, present, k, depth);
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
                multiply(sums + j * TILE + part, panels + part / PANEL * PANEL_BYTES, kind, format, columns, stride, depth);
            }
        }
    }
    finish(dst, sums, start, n, first, rows, choice);
}

/* ggml_custom_op_t. src: W [n_in, n_out], x [row_bytes(format_of_x, n_in), n], bias float32 [n_out] or none, and
 * perhaps a tensor float32 [n_out, n]; dst: [row_bytes(format, n_out), n]. */
static void linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) ith;
    struct qvl_params * params = userdata;
    const int64_t n_out = dst->src[0]->ne[1], n = dst->src[1]->ne[1];
    const int64_t blocks = (n + COLUMNS - 1) / COLUMNS, tiles = (n_out + TILE - 1) / TILE;
    const int64_t block = ((n + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    const int64_t row = row_bytes(format_of_x(dst, params->choice), DEPTH);
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
