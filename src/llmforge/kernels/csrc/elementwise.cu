// Elementwise ops on packed rows, one of: OP_ADD, x + y (y is a matrix, or with y_stride 0 one row
// for all); OP_GATED, activation(x) y, the activation rounded before the product; OP_ACTIVATION,
// activation(x); OP_SCALE, x factor; OP_CAP, factor tanh(x / factor); OP_CLAMP, x within ±factor. The
// last four have no y.
// FEATURES: elements of a row. WIDTH: elements a load. THREADS: block size.
// Grid: (tokens, blocks that cover a row). Strides are in elements, from token to token.
#include "common.cuh"
#include "activation.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
elementwise(T* out, const T* x, const T* y, int out_stride, int x_stride, int y_stride,
            float factor) {
    let_next_start();
    const int i = blockIdx.y * THREADS + threadIdx.x;
    wait_for_previous();
    if (i >= FEATURES / WIDTH) return;
    const size_t token = blockIdx.x;
    const Pack<WIDTH> a = ((const Pack<WIDTH>*)(x + token * x_stride))[i];
#if defined(OP_ADD) || defined(OP_GATED)
    const Pack<WIDTH> b = ((const Pack<WIDTH>*)(y + token * y_stride))[i];
#endif
    Pack<WIDTH> result;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
#if defined(OP_GATED)
        result.v[j] = from_float(rounded(activation(to_float(a.v[j]))) * to_float(b.v[j]));
#elif defined(OP_ADD)
        result.v[j] = from_float(to_float(a.v[j]) + to_float(b.v[j]));
#elif defined(OP_ACTIVATION)
        result.v[j] = from_float(activation(to_float(a.v[j])));
#elif defined(OP_SCALE)
        result.v[j] = from_float(to_float(a.v[j]) * factor);
#elif defined(OP_CLAMP)
        result.v[j] = from_float(fminf(fmaxf(to_float(a.v[j]), -factor), factor));
#elif defined(OP_CAP)
        result.v[j] = from_float(factor * tanhf(to_float(a.v[j]) / factor));
#endif
    }
    ((Pack<WIDTH>*)(out + token * out_stride))[i] = result;
}
