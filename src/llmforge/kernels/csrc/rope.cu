// Rotary position embedding of the first DIM elements of each head of HEAD_DIM, element i with
// i + DIM / 2. https://arxiv.org/abs/2104.09864
// `table` [tokens, DIM] is rope_table's. Grid: (tokens, heads); 32 threads.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(32)
rope(T* out, const T* x, const float* table, int out_stride, int x_stride) {
    let_next_start();
    wait_for_previous();
    const size_t token = blockIdx.x;
    const T* head = x + token * x_stride + blockIdx.y * HEAD_DIM;
    T* target = out + token * out_stride + blockIdx.y * HEAD_DIM;
    const float* angles = table + token * DIM;
    for (int i = threadIdx.x; i < DIM / 2; i += 32) {
        const float first = to_float(head[i]), second = to_float(head[i + DIM / 2]);
        const float cosine = angles[i], sine = angles[i + DIM / 2];
        target[i] = from_float(first * cosine - second * sine);
        target[i + DIM / 2] = from_float(second * cosine + first * sine);
    }
    for (int i = DIM + threadIdx.x; i < HEAD_DIM; i += 32) target[i] = head[i];
}
