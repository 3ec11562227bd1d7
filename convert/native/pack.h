/* From searches to blocks of 256, as ggml-common.h lays them out. Included once for each instruction set. */

INLINE float NAME(half_to_float)(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t NAME(to_half)(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

INLINE int NAME(nearest)(float x) {
    int32_t bits;
    x += ROUNDER;
    memcpy(&bits, &x, sizeof(bits));
    return (bits & 0x7fffff) - 0x400000;
}

INLINE int NAME(clamped)(float x, int low, int high) {
    const int level = NAME(nearest)(x);
    return level < low ? low : level > high ? high : level;
}

/* Levels of a block of floats, counted from `low`. */
INLINE void NAME(divide)(uint8_t * out, const float * x, int n, float add, float over, int low, int high) {
    for (int i = 0; i < n; i++) {
        out[i] = (uint8_t) (NAME(clamped)((x[i] + add) / over, low, high) - low);
    }
}

INLINE void NAME(multiply)(uint8_t * out, const float * x, int n, float less, float times, int low, int high) {
    for (int i = 0; i < n; i++) {
        out[i] = (uint8_t) (NAME(clamped)(times * (x[i] - less), low, high) - low);
    }
}

/* Eight values, none negative, to levels of six bits with one scale, which is returned (make_qp_quants). */
TARGET static float NAME(six_bits)(const float * x, const float * w, uint8_t * level) {
    enum { N = 8, TOP = 63 };
    float largest = 0.0f;
    for (int i = 0; i < N; i++) {
        largest = largest > x[i] ? largest : x[i];
    }
    memset(level, 0, N);
    if (largest < NEXT_TO_NOTHING) {
        return 0.0f;
    }
    float kept = 0.0f, best = 0.0f;
    for (int s = -5; s <= 4; s++) {
        if (s == 0) {
            continue;
        }
        const int first = s == -5; /* the plain scale goes first, and its levels are not bounded */
        const float inverse = first ? TOP / largest : (0.1f * (float) s + TOP) / largest;
        const float scale = 1.0f / inverse;
        float error = 0.0f;
        for (int i = 0; i < N; i++) {
            const int l = NAME(nearest)(inverse * x[i]);
            const float rest = x[i] - scale * (float) (first ? (uint8_t) l : l < TOP ? l : TOP);
            error += w[i] * rest * rest;
        }
        if (first || error < best) {
            best = error;
            kept = inverse;
        }
    }
    float lx = 0.0f, l2 = 0.0f;
    for (int i = 0; i < N; i++) {
        int l = NAME(nearest)(kept * x[i]);
        l = l < TOP ? l : TOP;
        level[i] = (uint8_t) l;
        lx += w[i] * x[i] * (float) l;
        l2 += w[i] * (float) l * (float) l;
    }
    for (int changed = 1, tries = 0; changed && tries < 5; tries++) {
        changed = 0;
        for (int i = 0; i < N; i++) {
            float other_lx = lx - w[i] * x[i] * (float) level[i];
            float other_l2 = l2 - w[i] * (float) level[i] * (float) level[i];
            if (!(other_lx > 0.0f && other_l2 > 0.0f)) {
                continue;
            }
            int l = NAME(nearest)(x[i] * other_l2 / other_lx);
            l = l < TOP ? l : TOP;
            if (l == level[i]) {
                continue;
            }
            other_lx += w[i] * x[i] * (float) l;
            other_l2 += w[i] * (float) l * (float) l;
            if (other_lx * other_lx * l2 > lx * lx * other_l2) {
                level[i] = (uint8_t) l;
                lx = other_lx;
                l2 = other_l2;
                changed = 1;
            }
        }
    }
    return l2 > 0.0f ? lx / l2 : 0.0f;
}

/* The same without weights: the largest is 63. */
TARGET static float NAME(six_bits_plain)(const float * x, uint8_t * level) {
    float largest = 0.0f;
    for (int i = 0; i < 8; i++) {
        largest = x[i] > largest ? x[i] : largest;
    }
    const float inverse = largest > 0.0f ? 63.0f / largest : 0.0f;
    for (int i = 0; i < 8; i++) {
        const uint8_t l = (uint8_t) NAME(nearest)(inverse * x[i]);
        level[i] = l < 63 ? l : 63;
    }
    return largest / 63.0f;
}

/* A block of Q4_K or Q5_K of the eight searches from `lane` on. */
TARGET static void NAME(pack_affine)(
    uint8_t * out, const float * x, const Affine * found, int lane, const Search * search, int weighed
) {
    uint8_t scales[8], offsets[8], levels[QK];
    const float * scale_in = found->scale + lane, *offset_in = found->offset + lane, *sum = found->sum + lane;
    uint16_t d[2];
    d[0] = NAME(to_half)(weighed ? NAME(six_bits)(scale_in, sum, scales) : NAME(six_bits_plain)(scale_in, scales));
    d[1] = NAME(to_half)(
        weighed ? NAME(six_bits)(offset_in, sum, offsets) : NAME(six_bits_plain)(offset_in, offsets)
    );
    memcpy(out, d, sizeof(d));
    uint8_t * packed = out + sizeof(d);
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t) ((scales[j] & 63) | (scales[j + 4] >> 4 << 6));
        packed[j + 4] = (uint8_t) ((offsets[j] & 63) | (offsets[j + 4] >> 4 << 6));
        packed[j + 8] = (uint8_t) ((scales[j + 4] & 15) | (offsets[j + 4] & 15) << 4);
    }
    for (int j = 0; j < 8; j++) {
        enum { N = AFFINE_BLOCK };
        const float scale = NAME(half_to_float)(d[0]) * (float) scales[j];
        if (scale != 0.0f) {
            const float offset = NAME(half_to_float)(d[1]) * (float) offsets[j];
            NAME(divide)(levels + j * N, x + j * N, N, offset, scale, 0, search->top);
        } else { /* too small to be kept: the search's own levels stay */
            const float low = found->low[lane + j], inverse = found->inverse[lane + j];
            NAME(multiply)(levels + j * N, x + j * N, N, low, inverse, 0, search->top);
        }
    }
    uint8_t * high = packed + 12, *low = search->top > 15 ? high + QK / 8 : high;
    if (search->top > 15) {
        for (int i = 0; i < 32; i++) {
            int bits = 0;
            for (int j = 0; j < 8; j++) {
                bits |= levels[32 * j + i] >> 4 << j;
            }
            high[i] = (uint8_t) bits;
        }
    }
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 32; i++) {
            low[32 * j + i] = (uint8_t) ((levels[64 * j + i] & 15) | levels[64 * j + 32 + i] << 4);
        }
    }
}

/* A block of Q6_K. */
TARGET static void NAME(pack_symmetric)(uint8_t * out, const float * x, const Symmetric * found) {
    enum { N = SYMMETRIC_BLOCK, TOP = 32, BLOCKS = QK / N };
    uint8_t levels[QK], *low = out, *high = out + QK / 2;
    int8_t * scales = (int8_t *) out + QK / 2 + QK / 4;
    float extreme = 0.0f;
    for (int j = 0; j < BLOCKS; j++) {
        extreme = fabsf(found->scale[j]) > fabsf(extreme) ? found->scale[j] : extreme;
    }
    if (fabsf(extreme) < NEXT_TO_NOTHING) {
        memset(out, 0, Q6_BYTES);
        return;
    }
    const float inverse = -128.0f / extreme;
    const uint16_t d = NAME(to_half)(1.0f / inverse);
    memcpy(out + Q6_BYTES - 2, &d, 2);
    for (int j = 0; j < BLOCKS; j++) {
        const int level = NAME(nearest)(inverse * found->scale[j]);
        scales[j] = (int8_t) (level < 127 ? level : 127);
        const float scale = NAME(half_to_float)(d) * (float) scales[j];
        if (scale != 0.0f) {
            NAME(divide)(levels + j * N, x + j * N, N, 0.0f, scale, -TOP, TOP - 1);
        } else if (found->largest[j] < NEXT_TO_NOTHING) {
            memset(levels + j * N, 0, N);
        } else {
            NAME(multiply)(levels + j * N, x + j * N, N, 0.0f, found->inverse[j], -TOP, TOP - 1);
        }
    }
    for (int half = 0; half < 2; half++, low += 64, high += 32) {
        const uint8_t * l = levels + 128 * half;
        for (int i = 0; i < 32; i++) {
            low[i] = (uint8_t) ((l[i] & 15) | l[i + 64] << 4);
            low[i + 32] = (uint8_t) ((l[i + 32] & 15) | l[i + 96] << 4);
            high[i] = (uint8_t) (l[i] >> 4 | l[i + 32] >> 4 << 2 | l[i + 64] >> 4 << 4 | l[i + 96] >> 4 << 6);
        }
    }
}

/* n blocks of 256 floats; columns [n_columns * 256] is their importance, or NULL. */
TARGET static void NAME(quantize_affine)(
    const float * x, uint8_t * out, int64_t n, int64_t n_columns, const float * columns, const Search * search
) {
    enum { AT_ONCE = LANES / 8 };
    const int64_t bytes = search->top > 15 ? Q5_BYTES : Q4_BYTES;
    float held[AT_ONCE * QK], weights[AT_ONCE * QK], energy[LANES];
    Affine found;
    for (int64_t at = 0; at < n; at += AT_ONCE) {
        const int64_t left = n - at < AT_ONCE ? n - at : AT_ONCE;
        const float * from = x + at * QK;
        if (left < AT_ONCE) { /* idle lanes do what the last one does */
            for (int i = 0; i < AT_ONCE; i++) {
                memcpy(held + i * QK, from + (i < left ? i : left - 1) * QK, QK * sizeof(float));
            }
            from = held;
        }
        for (int i = 0; columns != NULL && i < AT_ONCE; i++) {
            memcpy(weights + i * QK, columns + (at + (i < left ? i : left - 1)) % n_columns * QK, QK * sizeof(float));
            float sum = 0.0f;
            for (int k = 0; k < QK; k++) {
                sum += from[i * QK + k] * from[i * QK + k];
            }
            for (int j = 0; j < 8; j++) {
                energy[8 * i + j] = 2 * sum / QK;
            }
        }
        NAME(search_affine)(from, columns == NULL ? NULL : weights, energy, search, &found);
        for (int i = 0; i < left; i++) {
            NAME(pack_affine)(out + (at + i) * bytes, from + i * QK, &found, 8 * i, search, columns != NULL);
        }
    }
}

TARGET static void NAME(quantize_symmetric)(
    const float * x, uint8_t * out, int64_t n, int64_t n_columns, const float * columns
) {
    for (int64_t at = 0; at < n; at++, x += QK, out += Q6_BYTES) {
        Symmetric found, part;
        const float * weights = columns == NULL ? NULL : columns + at % n_columns * QK;
        for (int i = 0; i < QK / SYMMETRIC_BLOCK; i += LANES) {
            const int first = i * SYMMETRIC_BLOCK;
            NAME(search_symmetric)(x + first, weights == NULL ? NULL : weights + first, 32, &part);
            memcpy(found.scale + i, part.scale, LANES * sizeof(float));
            memcpy(found.inverse + i, part.inverse, LANES * sizeof(float));
            memcpy(found.largest + i, part.largest, LANES * sizeof(float));
        }
        NAME(pack_symmetric)(out, x, &found);
    }
}
