// From a head of a merged q|k|v product to attention's input, a warp a head, in two parts.
//   BIAS, NORM: whether there is a bias and a norm of q and k heads. ROPE_DIM: rotated elements of a
//   head, 0 for none.
#pragma once

// x = the head `source` with elements of `bias` from `at` on added, then normed where `norms`.
DEVICE void load_head(float (&x)[HEAD_DIM], int lane, const T* source, const T* bias, int at,
                      bool norms, const T* norm_weight, float eps) {
    float squares = 0;
    for (int i = lane; i < HEAD_DIM; i += 32) {
        float value = to_float(source[i]);
#if BIAS
        value = rounded(value + to_float(bias[at + i]));
#endif
        squares += value * value;
        x[i] = value;
    }
#if NORM
    if (norms) {
        const float scale = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
        for (int i = lane; i < HEAD_DIM; i += 32)
            x[i] = rounded(rounded(x[i] * scale) * to_float(norm_weight[i]));
    }
#endif
    __syncwarp();
}

// target = x, its first `rotated` elements (ROPE_DIM or none) rotated by a token's angles:
// `table` has for each ROPE_DIM / 2 cosines, then the sines.
DEVICE void store_head(T* target, const float (&x)[HEAD_DIM], int lane, const float* table,
                       size_t token, int rotated) {
    for (int i = lane; i < rotated / 2; i += 32) {
        const float first = x[i], second = x[i + ROPE_DIM / 2];
        const float cosine = table[token * ROPE_DIM + i];
        const float sine = table[token * ROPE_DIM + ROPE_DIM / 2 + i];
        target[i] = from_float(first * cosine - second * sine);
        target[i + ROPE_DIM / 2] = from_float(second * cosine + first * sine);
    }
    for (int i = rotated + lane; i < HEAD_DIM; i += 32) target[i] = from_float(x[i]);
}
