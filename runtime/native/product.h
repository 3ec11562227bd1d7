/* The product that all else is made of: ROWS columns of x with a panel of `vectors` registers of rows of W.
 *
 * A panel holds, for each block of inputs, the scales of its rows and then its values, 4 bytes of each row beside
 * 4 bytes of the next: what one instruction multiplies with the same 4 bytes of a column. Integers are summed
 * within a block, blocks in float32.
 */
#pragma once

#include "blocks.h"

enum {
    WIDE_STEPS = WIDE_BLOCK / WIDE_GROUP,
    BYTE_STEPS = BYTE_BLOCK / 4,
    PANEL = VECTORS * LANES, /* rows of W */
};

#define VECTOR_BYTES ((int64_t) sizeof(vf))
#define WIDE_PANEL_BYTES ((int64_t) VECTORS * VECTOR_BYTES * (WIDE_INTEGER + WIDE_STEPS))
#define BYTE_PANEL_BYTES ((int64_t) VECTORS * VECTOR_BYTES * (2 + BYTE_STEPS))

/* Transposes n steps (4 bytes each, a multiple of LANES) of LANES rows: out's rows are `width` steps apart. */
INLINE void pack_steps(char * out, int width, const char * rows, int64_t row_stride, int n) {
    for (int s = 0; s < n; s += LANES) {
        vi block[LANES];
        for (int i = 0; i < LANES; i++) {
            block[i] = load_int(rows + i * row_stride + 4 * s);
        }
        transpose(block);
        for (int i = 0; i < LANES; i++) {
            store_int(out + (int64_t) (s + i) * width * 4, block[i]);
        }
    }
}

/* Rows of wide blocks to a panel of `vectors` registers. */
INLINE void pack_wide(char * panel, const struct wide * rows, int64_t blocks_per_row, int blocks, int vectors) {
    const int n = vectors * LANES;
    const int64_t stride = blocks_per_row * (int64_t) sizeof(struct wide);
    for (int b = 0; b < blocks; b++, panel += WIDE_PANEL_BYTES) {
        char * out = panel;
#if WIDE_INTEGER
        for (int i = 0; i < n; i++) {
            memcpy(out + 4 * i, &rows[i * blocks_per_row + b].scale, 4);
        }
        out += 4 * n;
#endif
        for (int c = 0; c < n; c += LANES) {
            pack_steps(out + 4 * c, n, (const char *) rows[c * blocks_per_row + b].q, stride, WIDE_BLOCK / WIDE_GROUP);
        }
    }
}

#ifndef BYTE_PAIRS
#define BYTE_PAIRS 0
#endif

#if BYTE_PAIRS
/* The bytes of PANEL rows, n inputs, to a panel, behind the scales of each block: 8 inputs of one row after the other. */
INLINE void pack_bytes(char * panel, const uint8_t * rows, int64_t stride, int n) {
    for (int s = 0; s < n / 8; s++) {
        char * block = panel + s / (BYTE_STEPS / 2) * BYTE_PANEL_BYTES + 2 * VECTORS * VECTOR_BYTES;
        for (int i = 0; i < PANEL; i++) {
            memcpy(block + (s % (BYTE_STEPS / 2) * PANEL + i) * 8, rows + i * stride + 8 * s, 8);
        }
    }
}
#else
/* The bytes of PANEL rows, n inputs, to a panel, behind the scales of each block. LANES steps are whole blocks, or
 * blocks whole registers; what is past n is not read by the product. */
INLINE void pack_bytes(char * panel, const uint8_t * rows, int64_t stride, int n) {
    for (int s = 0; s < n / 4; s += LANES) {
        for (int c = 0; c < VECTORS; c++) {
            vi block[LANES];
            for (int i = 0; i < LANES; i++) {
                block[i] = load_int(rows + (c * LANES + i) * stride + 4 * s);
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) {
                char * out = panel + (s + i) / BYTE_STEPS * BYTE_PANEL_BYTES + 2 * VECTORS * VECTOR_BYTES;
                store_int(out + ((s + i) % BYTE_STEPS * VECTORS + c) * VECTOR_BYTES, block[i]);
            }
        }
    }
}
#endif

/* sums[r][..] = (add ? sums[r][..] : 0) + W x, for n_in inputs. Strides: of sums in floats, of x in bytes. */
INLINE void multiply_wide(float * sums, int64_t sums_stride, const char * panel, const char * x, int64_t x_stride,
                          int n_in, const int add, const int vectors, const int rows) {
    vf total[2 * ROWS][VECTORS];
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < vectors; c++) {
            total[r][c] = add ? load(sums + r * sums_stride + c * LANES) : splat(0.0f);
        }
    }
    for (int k = 0; k < n_in; k += WIDE_BLOCK, panel += WIDE_PANEL_BYTES, x += sizeof(struct wide)) {
        const int left = (n_in - k + WIDE_GROUP - 1) / WIDE_GROUP, steps = left < WIDE_STEPS ? left : WIDE_STEPS;
        const char * values = panel + WIDE_INTEGER * vectors * VECTOR_BYTES;
        const char * q = x + offsetof(struct wide, q);
#if WIDE_INTEGER
        vi acc[2 * ROWS][VECTORS];
        for (int r = 0; r < rows; r++) {
            for (int c = 0; c < vectors; c++) {
                acc[r][c] = splat_int(0);
            }
        }
#else
        vf (*acc)[VECTORS] = total;
#endif
        for (int s = 0; s < steps; s++) {
            vi w[VECTORS];
            for (int c = 0; c < vectors; c++) {
                w[c] = load_int(values + (s * vectors + c) * VECTOR_BYTES);
            }
            for (int r = 0; r < rows; r++) {
                const vi column = spread(q + r * x_stride + 4 * s);
                for (int c = 0; c < vectors; c++) {
                    acc[r][c] = wide_dot(acc[r][c], w[c], column);
                }
            }
        }
#if WIDE_INTEGER
        for (int r = 0; r < rows; r++) {
            const vf scale = (vf) spread(x + r * x_stride);
            for (int c = 0; c < vectors; c++) {
                total[r][c] += to_float(acc[r][c]) * (scale * load(panel + c * VECTOR_BYTES));
            }
        }
#endif
    }
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < vectors; c++) {
            store(sums + r * sums_stride + c * LANES, total[r][c]);
        }
    }
}

#if BYTE_PAIRS
/* The products of a block of bytes, of two columns with two rows at a time. */
INLINE void byte_steps(vi (*acc)[VECTORS], const char * values, const char * q, int64_t x_stride, const int flush) {
    (void) flush;
    vi pairs[ROWS / 2][2 * VECTORS];
    for (int r = 0; r < ROWS / 2; r++) {
        for (int c = 0; c < 2 * VECTORS; c++) {
            pairs[r][c] = splat_int(0);
        }
    }
    for (int s = 0; s < BYTE_STEPS / 2; s++) {
        vi columns[ROWS / 2];
        for (int r = 0; r < ROWS / 2; r++) {
            columns[r] = join(q + 2 * r * x_stride + 8 * s, q + (2 * r + 1) * x_stride + 8 * s);
        }
        for (int c = 0; c < 2 * VECTORS; c++) {
            const vi w = load_int(values + (2 * s * VECTORS + c) * VECTOR_BYTES);
            for (int r = 0; r < ROWS / 2; r++) {
                pairs[r][c] = pair_dot(pairs[r][c], columns[r], w);
            }
        }
    }
    for (int r = 0; r < ROWS / 2; r++) {
        for (int c = 0; c < VECTORS; c++) {
            split(pairs[r][2 * c], pairs[r][2 * c + 1], &acc[2 * r][c], &acc[2 * r + 1][c]);
        }
    }
}
#else
/* The products of a block of bytes; flush: steps for which sums fit 16 bits, where the level adds those. */
INLINE void byte_steps(vi (*acc)[VECTORS], const char * values, const char * q, int64_t x_stride, const int flush) {
#if BYTE_SUMS_16
    for (int first = 0; first < BYTE_STEPS; first += flush) {
        vi part[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++) {
            for (int c = 0; c < VECTORS; c++) {
                part[r][c] = splat_int(0);
            }
        }
#else
    {
        vi (*part)[VECTORS] = acc;
        const int first = 0;
#endif
        for (int s = first; s < (BYTE_SUMS_16 ? first + flush : BYTE_STEPS); s++) {
            vi w[VECTORS];
            for (int c = 0; c < VECTORS; c++) {
                w[c] = load_int(values + (s * VECTORS + c) * VECTOR_BYTES);
            }
            for (int r = 0; r < ROWS; r++) {
                const vi column = spread(q + r * x_stride + 4 * s);
                for (int c = 0; c < VECTORS; c++) {
                    part[r][c] = byte_dot(part[r][c], w[c], column);
                }
            }
        }
#if BYTE_SUMS_16
        for (int r = 0; r < ROWS; r++) {
            for (int c = 0; c < VECTORS; c++) {
                acc[r][c] = add_pairs(acc[r][c], part[r][c]);
            }
        }
#endif
    }
}
#endif

/* As multiply_wide, with `bytes`. W is scale * (q - offset) - min; flush: steps that a 16-bit sum lasts. */
INLINE void multiply_bytes(float * sums, int64_t sums_stride, const char * panel, const char * x, int64_t x_stride,
                           int n_in, const int has_min, const int flush) {
    vf total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < VECTORS; c++) {
            total[r][c] = load(sums + r * sums_stride + c * LANES);
        }
    }
    for (int k = 0; k < n_in; k += BYTE_BLOCK, panel += BYTE_PANEL_BYTES, x += sizeof(struct bytes)) {
        const char * values = panel + 2 * VECTORS * VECTOR_BYTES;
        const char * q = x + offsetof(struct bytes, q);
        vi acc[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++) {
            const vi start = has_min || BYTE_OFFSET == 0 ? splat_int(0) : spread(x + r * x_stride + offsetof(struct bytes, sum));
            for (int c = 0; c < VECTORS; c++) {
                acc[r][c] = start;
            }
        }
        byte_steps(acc, values, q, x_stride, flush);
        for (int r = 0; r < ROWS; r++) {
            const vf scale = (vf) spread(x + r * x_stride);
            const vf sum = has_min ? scale * to_float(spread(x + r * x_stride + offsetof(struct bytes, sum))) : scale;
            for (int c = 0; c < VECTORS; c++) {
                total[r][c] += to_float(acc[r][c]) * (scale * load(panel + c * VECTOR_BYTES));
                if (has_min) {
                    total[r][c] -= sum * load(panel + (VECTORS + c) * VECTOR_BYTES);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < VECTORS; c++) {
            store(sums + r * sums_stride + c * LANES, total[r][c]);
        }
    }
}
