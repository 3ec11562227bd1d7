/* The searches of ggml's K-quants, LANES blocks at once: one block in each lane.
 *
 * A lane does for its block what ggml-quants.c does, operation by operation and in that order, so that it
 * comes to the same float and in the end to the same bytes. No multiplication may be fused with an addition.
 * Included once for each instruction set, after lanes.h.
 */

/* LANES rows of n floats, of which row i begins at rows + i * stride, into n registers. */
INLINE void NAME(transpose)(VF * out, const float * rows, int n, int stride) {
    float held[MAX_BLOCK * LANES];
    for (int lane = 0; lane < LANES; lane++) {
        for (int i = 0; i < n; i++) {
            held[i * LANES + lane] = rows[lane * stride + i];
        }
    }
    for (int i = 0; i < n; i++) {
        out[i] = NAME(load)(held + i * LANES);
    }
}

/* x ~ scale * level - offset with levels from 0 to `top`: least squares for each of several roundings, the best
 * of them by its weighted error (make_qkx2_quants, make_qkx3_quants). What was rounded to levels at last is
 * (x - low) * inverse. */
TARGET static void NAME(affine)(const VF * x, const VF * w, const Search * search, Affine * found) {
    enum { N = AFFINE_BLOCK };
    const int top = search->top;
    const VF zero = NAME(all)(0.0f);
    VF low = x[0], high = x[0], sum_w = w[0], sum_x = sum_w * x[0];
    for (int i = 1; i < N; i++) {
        low = NAME(pick)(NAME(less)(x[i], low), x[i], low);
        high = NAME(pick)(NAME(less)(high, x[i]), x[i], high);
        sum_w = sum_w + w[i];
        sum_x = sum_x + w[i] * x[i];
    }
    low = NAME(pick)(NAME(less)(zero, low), zero, low);
    VF level[N];
    VF inverse = NAME(all)((float) top) / (high - low);
    VF scale = NAME(all)(1.0f) / inverse, min = low, best = zero;
    VF kept_low = low, kept_inverse = inverse;
    for (int i = 0; i < N; i++) {
        const VF error = scale * NAME(level)(inverse * (x[i] - low), 0, top) + low - x[i];
        best = best + w[i] * (error * error);
    }
    for (int s = 0; s <= search->steps; s++) {
        inverse = NAME(all)(search->first + search->delta * (float) s + (float) top) / (high - min);
        VF l1 = zero, l2 = zero, lx = zero;
        for (int i = 0; i < N; i++) {
            level[i] = NAME(level)(inverse * (x[i] - min), 0, top);
            const VF wl = w[i] * level[i];
            l1 = l1 + wl;
            l2 = l2 + wl * level[i];
            lx = lx + wl * x[i];
        }
        const VF determinant = sum_w * l2 - l1 * l1;
        VF new_scale = (sum_w * lx - sum_x * l1) / determinant;
        VF new_min = (l2 * sum_x - l1 * lx) / determinant;
        const VM positive = NAME(less)(zero, new_min);
        new_min = NAME(pick)(positive, zero, new_min);
        new_scale = NAME(pick)(positive, lx / l2, new_scale);
        VF total = zero;
        for (int i = 0; i < N; i++) {
            const VF error = new_scale * level[i] + new_min - x[i];
            total = total + w[i] * (error * error);
        }
        const VM better = NAME(both)(NAME(less)(zero, determinant), NAME(less)(total, best));
        best = NAME(pick)(better, total, best);
        scale = NAME(pick)(better, new_scale, scale);
        kept_low = NAME(pick)(better, min, kept_low);
        kept_inverse = NAME(pick)(better, inverse, kept_inverse);
        min = NAME(pick)(better, new_min, min);
    }
    /* A block of one value, which is not positive: no scale. */
    const VM flat = NAME(less)(low, high);
    NAME(store)(found->scale, NAME(pick)(flat, scale, zero));
    NAME(store)(found->offset, zero - NAME(pick)(flat, min, low));
    NAME(store)(found->low, kept_low);
    NAME(store)(found->inverse, NAME(pick)(flat, kept_inverse, zero));
}

/* x ~ scale * level with levels from -top to top - 1 (make_qx_quants with weights, or squares of x). `inverse`
 * is what the best rounding multiplied with; the scale is 0 where all is next to nothing. */
TARGET static void NAME(symmetric)(const VF * x, const VF * w, int top, Symmetric * found) {
    enum { N = SYMMETRIC_BLOCK };
    const VF zero = NAME(all)(0.0f);
    VF largest = zero, extreme = zero;
    for (int i = 0; i < N; i++) {
        const VF size = NAME(magnitude)(x[i]);
        const VM more = NAME(less)(largest, size);
        largest = NAME(pick)(more, size, largest);
        extreme = NAME(pick)(more, x[i], extreme);
    }
    VF inverse = NAME(all)(-(float) top) / extreme;
    VF kept = inverse, scale = zero, best = zero;
    for (int s = -10; s <= 9; s++) {
        const int first = s == -10;
        if (s == 0) {
            continue; /* the first guess, which was made in the place of -10 */
        }
        if (!first) {
            inverse = NAME(all)(-((float) top + 0.1f * (float) s)) / extreme;
        }
        VF lx = zero, l2 = zero;
        for (int i = 0; i < N; i++) {
            const VF level = NAME(level)(inverse * x[i], -top, top - 1);
            lx = lx + w[i] * x[i] * level;
            l2 = l2 + w[i] * level * level;
        }
        const VF ratio = lx / l2;
        const VM some = NAME(less)(zero, l2);
        if (first) {
            scale = NAME(pick)(some, ratio, zero);
            best = scale * lx;
        } else {
            const VM better = NAME(both)(some, NAME(less)(best * l2, lx * lx));
            kept = NAME(pick)(better, inverse, kept);
            scale = NAME(pick)(better, ratio, scale);
            best = NAME(pick)(better, ratio * lx, best);
        }
    }
    const VM nothing = NAME(less)(largest, NAME(all)(NEXT_TO_NOTHING));
    NAME(store)(found->scale, NAME(pick)(nothing, zero, scale));
    NAME(store)(found->inverse, kept);
    NAME(store)(found->largest, largest);
}

/* Searches for the blocks of LANES * AFFINE_BLOCK floats. `columns` are the importance of these columns, or
 * NULL; `energy` is twice the mean square of each block's row of 256, where there is importance. `sums` gets
 * the sum of each block's weights. */
TARGET static void NAME(search_affine)(
    const float * in, const float * columns, const float * energy, const Search * search, Affine * found
) {
    enum { N = AFFINE_BLOCK };
    VF x[N], w[N];
    NAME(transpose)(x, in, N, N);
    VF sum = NAME(all)(0.0f);
    if (columns == NULL) {
        for (int i = 0; i < N; i++) {
            sum = sum + x[i] * x[i];
        }
        const VF mean = NAME(root)(sum / NAME(all)((float) N));
        for (int i = 0; i < N; i++) {
            w[i] = mean + NAME(magnitude)(x[i]);
        }
    } else {
        NAME(transpose)(w, columns, N, N);
        const VF e = NAME(load)(energy);
        for (int i = 0; i < N; i++) {
            w[i] = w[i] * NAME(root)(e + x[i] * x[i]);
            sum = sum + w[i];
        }
        NAME(store)(found->sum, sum);
    }
    NAME(affine)(x, w, search, found);
}

TARGET static void NAME(search_symmetric)(const float * in, const float * columns, int top, Symmetric * found) {
    enum { N = SYMMETRIC_BLOCK };
    VF x[N], w[N];
    NAME(transpose)(x, in, N, N);
    if (columns == NULL) {
        for (int i = 0; i < N; i++) {
            w[i] = x[i] * x[i];
        }
    } else {
        NAME(transpose)(w, columns, N, N);
    }
    NAME(symmetric)(x, w, top, found);
}
