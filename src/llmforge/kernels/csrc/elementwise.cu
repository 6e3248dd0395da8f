// Elementwise ops on packed rows: OP_ADD (y is a matrix, or with y_stride 0 one row for all) and
// OP_GATED, activation(x) y, the activation rounded before the product.
// FEATURES: elements of a row. WIDTH: elements a load. THREADS: block size.
// Grid: (tokens, blocks that cover a row). Strides are in elements, from token to token.
#include "common.cuh"
#include "activation.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
elementwise(T* out, const T* x, const T* y, int out_stride, int x_stride, int y_stride) {
    let_next_start();
    const int i = blockIdx.y * THREADS + threadIdx.x;
    wait_for_previous();
    if (i >= FEATURES / WIDTH) return;
    const size_t token = blockIdx.x;
    const Pack<WIDTH> a = ((const Pack<WIDTH>*)(x + token * x_stride))[i];
    const Pack<WIDTH> b = ((const Pack<WIDTH>*)(y + token * y_stride))[i];
    Pack<WIDTH> result;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
#if OP_GATED
        result.v[j] = from_float(rounded(activation(to_float(a.v[j]))) * to_float(b.v[j]));
#else
        result.v[j] = from_float(to_float(a.v[j]) + to_float(b.v[j]));
#endif
    }
    ((Pack<WIDTH>*)(out + token * out_stride))[i] = result;
}
