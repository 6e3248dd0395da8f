// LayerNorm of runs of RUN elements: (x - mean) / deviation weight + bias, all in float32, rounded
// once. https://arxiv.org/abs/1607.06450
// BIAS: whether there is one. SHARED: one weight (and bias) for every run, else each has its own.
// THREADS: block size. Grid: (tokens, runs a token). Strides are in elements.
#include "common.cuh"

#define PER_THREAD ((RUN + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(T* out, const T* x, const T* weight, const T* bias, int out_stride, int x_stride,
           float eps) {
    __shared__ float scratch[2][32];
    let_next_start();
    const int run = blockIdx.y * RUN, own = SHARED ? 0 : run;
    const T* x_row = x + (size_t)blockIdx.x * x_stride + run;
    T* out_row = out + (size_t)blockIdx.x * out_stride + run;
    wait_for_previous();
    float kept[PER_THREAD], sum = 0, squares = 0;
#pragma unroll
    for (int p = 0; p < PER_THREAD; p++) {
        const int i = p * THREADS + threadIdx.x;
        kept[p] = i < RUN ? to_float(x_row[i]) : 0.0f;
        sum += kept[p];
    }
    const float mean = block_sum(sum, scratch[0]) / RUN;
#pragma unroll
    for (int p = 0; p < PER_THREAD; p++) {
        const int i = p * THREADS + threadIdx.x;
        if (i < RUN) squares += (kept[p] - mean) * (kept[p] - mean);
    }
    const float scale = rsqrtf(block_sum(squares, scratch[1]) / RUN + eps);
#pragma unroll
    for (int p = 0; p < PER_THREAD; p++) {
        const int i = p * THREADS + threadIdx.x;
        if (i >= RUN) break;
        float value = (kept[p] - mean) * scale * to_float(weight[own + i]);
#if BIAS
        value += to_float(bias[own + i]);
#endif
        out_row[i] = from_float(value);
    }
}
