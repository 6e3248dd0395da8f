// RMSNorm of features that ranks share among them. `square_sum`: the sum of the squares of each row's
// FEATURES elements, in float32. `rms_norm_by`: x / sqrt(square_sum / size + eps), rounded, times
// weight. THREADS: block size. Grid: one block a token. Strides are in elements.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
square_sum(float* out, const T* x, int x_stride) {
    __shared__ float scratch[32];
    let_next_start();
    wait_for_previous();
    const T* row = x + (size_t)blockIdx.x * x_stride;
    float squares = 0;
    for (int i = threadIdx.x; i < FEATURES; i += THREADS)
        squares += to_float(row[i]) * to_float(row[i]);
    squares = block_sum(squares, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = squares;
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_by(T* out, const T* x, const float* square_sum, const T* weight, int out_stride,
            int x_stride, float size, float eps) {
    let_next_start();
    wait_for_previous();
    const float scale = rsqrtf(square_sum[blockIdx.x] / size + eps);
    const T* row = x + (size_t)blockIdx.x * x_stride;
    T* target = out + (size_t)blockIdx.x * out_stride;
    for (int i = threadIdx.x; i < FEATURES; i += THREADS)
        target[i] = from_float(rounded(to_float(row[i]) * scale) * to_float(weight[i]));
}
