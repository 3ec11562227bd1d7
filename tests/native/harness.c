/* Every kernel of every level that runs here, with random shapes, against plain C in double: for sanitizers and for
 * processors that are emulated. harness [CASES]; says which levels ran, exits 1 on a wrong result. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct qvl_kernels * qvl_level(int index);

static uint64_t state = 1;

static int below(int n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int) ((state >> 33) % (uint64_t) n);
}

static float noise(void) { return ((float) below(20001) - 10000.0f) / 5000.0f; }

/* Memory of exactly this size, so that a sanitizer sees what is read beyond it. */
static void * filled(int64_t n) {
    float * x = malloc((size_t) n * 4);
    for (int64_t i = 0; i < n; i++) {
        x[i] = noise();
    }
    return x;
}

static struct ggml_tensor tensor(int type, int64_t row, int64_t a, int64_t b, int64_t c, void * data) {
    struct ggml_tensor t = { .type = type, .ne = { a, b, c, 1 }, .data = data };
    t.nb[0] = 4;
    t.nb[1] = (size_t) row;
    t.nb[2] = (size_t) (row * b);
    t.nb[3] = (size_t) (row * b * c);
    return t;
}

static int check(const char * level, const char * what, double found, double expected, double bound) {
    if (fabs(found - expected) <= bound) {
        return 0;
    }
    printf("%s %s: %g, expected %g within %g\n", level, what, found, expected, bound);
    return 1;
}

/* Types of weights: elements and bytes of a block. */
static const struct stored {
    int type, block, bytes;
} STORED[] = {
    { GGML_TYPE_F32, 1, 4 },    { GGML_TYPE_F16, 1, 2 },     { GGML_TYPE_BF16, 1, 2 },    { GGML_TYPE_Q8_0, 32, 34 },
    { GGML_TYPE_Q4_K, 256, 144 }, { GGML_TYPE_Q5_K, 256, 176 }, { GGML_TYPE_Q6_K, 256, 210 },
};

static const uint16_t SCALE = 0x1400; /* 1/1024 as float16 */

static void q8_0(uint8_t * raw, float * out) {
    memcpy(raw, &SCALE, 2);
    for (int j = 0; j < 32; j++) {
        const int q = below(255) - 127;
        raw[2 + j] = (uint8_t) (int8_t) q;
        out[j] = (float) q / 1024.0f;
    }
}

/* Q4_K, or Q5_K with its fifth bits, with scales of 1 to 63 and minima likewise. */
static void q4_k(uint8_t * raw, float * out, int fifth) {
    uint8_t *high = raw + 16, *low = raw + (fifth ? 48 : 16);
    memcpy(raw, &SCALE, 2);
    memcpy(raw + 2, &SCALE, 2);
    memset(raw + 4, 0, (size_t) (fifth ? 172 : 140));
    for (int j = 0; j < 8; j++) {
        const int s = 1 + below(63), m = below(64);
        if (j < 4) {
            raw[4 + j] |= (uint8_t) s;
            raw[8 + j] |= (uint8_t) m;
        } else {
            raw[8 + j] |= (uint8_t) ((s & 15) | (m & 15) << 4);
            raw[j] |= (uint8_t) (s >> 4 << 6);
            raw[4 + j] |= (uint8_t) (m >> 4 << 6);
        }
        for (int l = 0; l < 32; l++) {
            const int q = below(fifth ? 32 : 16);
            low[j / 2 * 32 + l] |= (uint8_t) ((q & 15) << j % 2 * 4);
            if (fifth) {
                high[l] |= (uint8_t) (q >> 4 << j);
            }
            out[j * 32 + l] = (float) (s * q - m) / 1024.0f;
        }
    }
}

static void q6_k(uint8_t * raw, float * out) {
    memset(raw, 0, 208);
    memcpy(raw + 208, &SCALE, 2);
    for (int j = 0; j < 16; j++) {
        const int s = below(255) - 127;
        raw[192 + j] = (uint8_t) (int8_t) s;
        for (int l = 0; l < 16; l++) {
            const int q = below(64);
            raw[j / 8 * 64 + j % 4 * 16 + l] |= (uint8_t) ((q & 15) << j / 4 % 2 * 4);
            raw[128 + j / 8 * 32 + j % 2 * 16 + l] |= (uint8_t) (q >> 4 << j / 2 % 4 * 2);
            out[j * 16 + l] = (float) (s * (q - 32)) / 1024.0f;
        }
    }
}

/* A row of random weights in a type's bytes, and its values. */
static void store_row(int type, uint8_t * raw, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t) below(1 << 16) << 16;
        if (type == GGML_TYPE_F32) {
            memcpy(raw + i * 4, out + i, 4);
        } else if (type == GGML_TYPE_F16) { /* 1/2 to 1 in steps of 1/2048, and signs */
            const uint16_t half = (uint16_t) (14 << 10 | (bits >> 16 & 0x83ff));
            out[i] = (half & 0x8000 ? -0.5f : 0.5f) * (1.0f + (float) (half & 1023) / 1024.0f);
            memcpy(raw + i * 2, &half, 2);
        } else if (type == GGML_TYPE_BF16) {
            bits = (bits & 0x80ff0000) | 0x3f000000;
            memcpy(out + i, &bits, 4);
            bits >>= 16;
            memcpy(raw + i * 2, &bits, 2);
        } else if (type == GGML_TYPE_Q8_0 && i % 32 == 0) {
            q8_0(raw + i / 32 * 34, out + i);
        } else if (type == GGML_TYPE_Q4_K && i % 256 == 0) {
            q4_k(raw + i / 256 * 144, out + i, 0);
        } else if (type == GGML_TYPE_Q5_K && i % 256 == 0) {
            q4_k(raw + i / 256 * 176, out + i, 1);
        } else if (type == GGML_TYPE_Q6_K && i % 256 == 0) {
            q6_k(raw + i / 256 * 210, out + i);
        }
    }
}

static int linear(const struct qvl_kernels * k, const struct stored * stored) {
    const int type = stored->type, unit = stored->block;
    const int64_t n_in = (int64_t) (1 + below(unit == 1 ? 600 : 3)) * unit, n_out = 1 + below(150), n = 1 + below(20);
    const int64_t row = n_in / unit * stored->bytes;
    float * weights = filled(n_in * n_out);
    uint8_t * raw = malloc((size_t) (row * n_out));
    for (int64_t i = 0; i < n_out; i++) {
        store_row(type, raw + i * row, weights + i * n_in, n_in);
    }
    float *x = filled(n_in * n), *bias = filled(n_out), *other = filled(n_out * n), *y = filled(n_out * n);
    const int format = k->takes(type);
    char * packed = malloc((size_t) (k->row_bytes(format, n_in) * n));
    struct ggml_tensor w = tensor(type, row, n_in, n_out, 1, raw), in = tensor(0, n_in * 4, n_in, n, 1, x);
    struct ggml_tensor p = tensor(24, k->row_bytes(format, n_in), k->row_bytes(format, n_in), n, 1, packed);
    struct ggml_tensor b = tensor(0, n_out * 4, n_out, 1, 1, bias), o = tensor(0, n_out * 4, n_out, n, 1, other);
    struct ggml_tensor dst = tensor(0, n_out * 4, n_out, n, 1, y);
    struct qvl_params params = { .choice = format << 16 };
    p.src[0] = &in;
    k->prepare(&p, 0, 1, &params);
    dst.src[0] = &w;
    dst.src[1] = &p;
    dst.src[2] = below(2) ? &b : NULL;
    dst.src[3] = below(2) ? &o : NULL;
    params.choice = 0;
    k->linear(&dst, 0, 1, &params);
    int wrong = params.failed;
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < n_out; i++) {
            double sum = 0, size = 1;
            for (int64_t l = 0; l < n_in; l++) {
                sum += (double) x[j * n_in + l] * weights[i * n_in + l];
                size += 2.0 * fabs((double) weights[i * n_in + l]);
            }
            sum += dst.src[2] ? bias[i] : 0;
            sum += dst.src[3] ? other[j * n_out + i] : 0;
            wrong |= check(k->name, "linear", y[j * n_out + i], sum, size * (format == QVL_BYTES ? 1 / 250.0 : 1 / 120.0));
        }
    }
    free(weights), free(raw), free(x), free(bias), free(other), free(y), free(packed);
    return wrong;
}

static int attention(const struct qvl_kernels * k) {
    const int64_t dim = 1 + below(k->max_head), heads = 1 + below(2), size = 1 + below(150), count = 1 + below(2);
    const int64_t n = size * count, all = dim * heads * n;
    float *q = filled(all), *key = filled(all), *v = filled(all), *y = filled(all);
    struct ggml_tensor t[3], dst = tensor(0, dim * heads * 4, dim * heads, n, 1, y);
    float * data[3] = { q, key, v };
    for (int i = 0; i < 3; i++) {
        t[i] = tensor(0, dim * 4, dim, heads, n, data[i]);
        dst.src[i] = &t[i];
    }
    struct qvl_params * params = calloc(1, sizeof *params + sizeof *params->runs);
    params->scalar = 0.5f / sqrtf((float) dim);
    params->choice = 1;
    params->runs[0].count = count;
    params->runs[0].size = size;
    k->attention(&dst, 0, 1, params);
    int wrong = params->failed;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t h = 0; h < heads; h++) {
            double sums[128] = { 0 }, total = 0;
            for (int64_t j = i / size * size; j < (i / size + 1) * size; j++) {
                double score = 0;
                for (int64_t d = 0; d < dim; d++) {
                    score += (double) q[(i * heads + h) * dim + d] * key[(j * heads + h) * dim + d];
                }
                const double weight = exp(score * (double) params->scalar);
                total += weight;
                for (int64_t d = 0; d < dim; d++) {
                    sums[d] += weight * v[(j * heads + h) * dim + d];
                }
            }
            for (int64_t d = 0; d < dim; d++) {
                wrong |= check(k->name, "attention", y[(i * heads + h) * dim + d], sums[d] / total, 0.06);
            }
        }
    }
    free(q), free(key), free(v), free(y), free(params);
    return wrong;
}

static int norm(const struct qvl_kernels * k) {
    const int64_t n_in = 2 + below(300), n = 1 + below(4);
    const int rms = below(2), format = below(3);
    float *x = filled(n_in * n), *weight = filled(n_in), *bias = filled(n_in);
    const int64_t row = k->row_bytes(format, n_in);
    char * y = malloc((size_t) (row * n));
    struct ggml_tensor in = tensor(0, n_in * 4, n_in, n, 1, x), w = tensor(0, n_in * 4, n_in, 1, 1, weight);
    struct ggml_tensor b = tensor(0, n_in * 4, n_in, 1, 1, bias), dst = tensor(0, row, n_in, n, 1, y);
    struct qvl_params params = { .scalar = 1e-6f, .choice = rms | format << 16 };
    dst.src[0] = &in;
    dst.src[1] = &w;
    dst.src[2] = rms ? NULL : &b;
    k->norm(&dst, 0, 1, &params);
    int wrong = 0;
    for (int64_t j = 0; j < n && format == QVL_F32; j++) {
        double mean = 0, squares = 0;
        for (int64_t i = 0; i < n_in; i++) {
            mean += rms ? 0 : x[j * n_in + i] / (double) n_in;
        }
        for (int64_t i = 0; i < n_in; i++) {
            squares += (x[j * n_in + i] - mean) * (x[j * n_in + i] - mean) / (double) n_in;
        }
        for (int64_t i = 0; i < n_in; i++) {
            const double y_i = (x[j * n_in + i] - mean) / sqrt(squares + 1e-6) * weight[i] + (rms ? 0 : bias[i]);
            wrong |= check(k->name, "norm", ((float *) (y + j * row))[i], y_i, 1e-3);
        }
    }
    free(x), free(weight), free(bias), free(y);
    return wrong;
}

int main(int argc, char ** argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 30;
    const struct qvl_kernels * k;
    int wrong = 0, ran = 0;
    for (int i = 0; (k = qvl_level(i)) != NULL; i++) {
        if (!k->supported()) {
            printf("%s: not on this processor\n", k->name);
            continue;
        }
        for (int c = 0; c < cases; c++) {
            for (size_t t = 0; t < sizeof STORED / sizeof *STORED; t++) {
                wrong |= linear(k, &STORED[t]);
            }
            wrong |= attention(k) | norm(k);
        }
        printf("%s: %d cases of each kernel\n", k->name, cases);
        ran++;
    }
    return wrong || ran == 0;
}
