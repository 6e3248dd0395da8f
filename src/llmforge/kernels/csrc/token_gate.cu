// x sigmoid(by · weight): one factor a token, in float32. FEATURES of x, HIDDEN of `by`. THREADS.
// Grid: one block a token. Strides are in elements.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
token_gate(T* out, const T* x, const T* by, const T* weight, int out_stride, int x_stride,
           int by_stride) {
    __shared__ float scratch[32];
    let_next_start();
    wait_for_previous();
    const size_t token = blockIdx.x;
    float sum = 0;
    for (int i = threadIdx.x; i < HIDDEN; i += THREADS)
        sum += to_float(by[token * by_stride + i]) * to_float(weight[i]);
    const float factor = 1.0f / (1.0f + expf(-block_sum(sum, scratch)));
    for (int i = threadIdx.x; i < FEATURES; i += THREADS)
        out[token * out_stride + i] = from_float(to_float(x[token * x_stride + i]) * factor);
}
