/* Layer norm and RMS norm, and activations in the format that a linear layer takes. */
#pragma once

#include "blocks.h"

/* ggml_custom_op_t. src: x float32 [n_in, n], weight float32 [n_in], and for a layer norm bias float32 [n_in];
 * dst: [row_bytes(format, n_in), n]. */
static void norm(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct qvl_params * params = userdata;
    const struct ggml_tensor *x = dst->src[0], *bias = dst->src[2];
    const float * weight = dst->src[1]->data;
    const int format = QVL_FORMAT(params->choice), rms = QVL_FIRST(params->choice) == QVL_RMS_NORM;
    const int64_t n_in = x->ne[0], whole = n_in / LANES * LANES;
    for (int64_t column = ith; column < x->ne[1]; column += nth) {
        const float * in = (const float *) ((const char *) x->data + column * (int64_t) x->nb[1]);
        float mean = 0.0f, squares = 0.0f;
        vf sums = splat(0.0f);
        if (!rms) {
            for (int64_t i = 0; i < whole; i += LANES) {
                sums += load(in + i);
            }
            mean = across_sum(sums);
            for (int64_t i = whole; i < n_in; i++) {
                mean += in[i];
            }
            mean /= (float) n_in;
        }
        sums = splat(0.0f);
        for (int64_t i = 0; i < whole; i += LANES) {
            const vf d = load(in + i) - splat(mean);
            sums += d * d;
        }
        squares = across_sum(sums);
        for (int64_t i = whole; i < n_in; i++) {
            squares += (in[i] - mean) * (in[i] - mean);
        }
        const float factor = 1.0f / sqrtf(squares / (float) n_in + params->scalar);
        for (int64_t first = 0; first < n_in; first += WIDE_BLOCK) {
            const int n = n_in - first < WIDE_BLOCK ? (int) (n_in - first) : WIDE_BLOCK;
            float y[WIDE_BLOCK];
            for (int i = 0; i < n; i++) {
                y[i] = (in[first + i] - mean) * factor * weight[first + i];
            }
            if (bias != NULL) {
                const float * shift = (const float *) bias->data + first;
                for (int i = 0; i < n; i++) {
                    y[i] += shift[i];
                }
            }
            put((char *) dst->data + column * (int64_t) dst->nb[1], format, first, y, n);
        }
    }
}

/* ggml_custom_op_t. src: x float32 [n_in, n]; dst: [row_bytes(format, n_in), n]. */
static void prepare(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const int format = QVL_FORMAT(((const struct qvl_params *) userdata)->choice);
    const struct ggml_tensor * x = dst->src[0];
    for (int64_t column = ith; column < x->ne[1]; column += nth) {
        const float * in = (const float *) ((const char *) x->data + column * (int64_t) x->nb[1]);
        for (int64_t first = 0; first < x->ne[0]; first += WIDE_BLOCK) {
            const int n = x->ne[0] - first < WIDE_BLOCK ? (int) (x->ne[0] - first) : WIDE_BLOCK;
            float y[WIDE_BLOCK];
            memcpy(y, in + first, (size_t) n * 4);
            put((char *) dst->data + column * (int64_t) dst->nb[1], format, first, y, n);
        }
    }
}
