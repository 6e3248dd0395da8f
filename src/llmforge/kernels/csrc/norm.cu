// RMSNorm of runs of RUN elements, with or without the residual addition before it.
// https://arxiv.org/abs/1910.07467; the normed value is rounded before the weight is applied.
// WIDTH: elements a load. THREADS: block size. ADD: out_sum = x + residual is normalised and kept.
// Grid: (tokens, runs a token). Strides are in elements, from token to token.
#include "common.cuh"

#define PACKS ((RUN / WIDTH + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(T* out, T* out_sum, const T* x, const T* residual, const T* weight, int out_stride,
         int sum_stride, int x_stride, int residual_stride, float eps) {
    __shared__ float scratch[32];
    let_next_start();
    const int run = blockIdx.y * RUN;
    const Pack<WIDTH>* x_row = (const Pack<WIDTH>*)(x + (size_t)blockIdx.x * x_stride + run);
    Pack<WIDTH>* out_row = (Pack<WIDTH>*)(out + (size_t)blockIdx.x * out_stride + run);
    wait_for_previous();
    Pack<WIDTH> kept[PACKS];
    float squares = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int i = p * THREADS + threadIdx.x;
        if (i >= RUN / WIDTH) break;
        Pack<WIDTH> value = x_row[i];
#if ADD
        const Pack<WIDTH> other =
            ((const Pack<WIDTH>*)(residual + (size_t)blockIdx.x * residual_stride + run))[i];
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            value.v[j] = from_float(to_float(value.v[j]) + to_float(other.v[j]));
        ((Pack<WIDTH>*)(out_sum + (size_t)blockIdx.x * sum_stride + run))[i] = value;
#endif
#pragma unroll
        for (int j = 0; j < WIDTH; j++) squares += to_float(value.v[j]) * to_float(value.v[j]);
        kept[p] = value;
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / RUN + eps);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int i = p * THREADS + threadIdx.x;
        if (i >= RUN / WIDTH) break;
        const Pack<WIDTH> w = ((const Pack<WIDTH>*)weight)[i];
        Pack<WIDTH> result;
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            result.v[j] = from_float(rounded(to_float(kept[p].v[j]) * scale) * to_float(w.v[j]));
        out_row[i] = result;
    }
}
