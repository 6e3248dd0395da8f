// Mixtures of experts for few tokens: each chosen expert's weights are read once for each token that
// chose it, 16 bytes a load. `expert_up`: activated[token, choice] of INNER elements; a warp computes
// one of them, from its rows of gate and up. Grid: (tokens * TOP_K, INNER / WARPS).
// `expert_down`: out[token] = the sum over its choices, in their order, of weight times the product,
// rounded; a warp computes one element for all choices. Grid: (tokens, HIDDEN / WARPS).
//   FIRST, COUNT: the experts that are held here. WIDTH: elements a load. BIAS: whether there are any.
#include "common.cuh"
#include "activation.cuh"
#include "expert.cuh"

typedef Pack<WIDTH> P;

// The lane's part of the product of a row of weights and x, both of SIZE elements.
template <int SIZE>
DEVICE float partial(const T* row, const T* x) {
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < SIZE / WIDTH; i += 32) {
        const P w = ((const P*)row)[i], v = ((const P*)x)[i];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum += to_float(w.v[j]) * to_float(v.v[j]);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
expert_up(T* activated, const T* x, const int* ids, const T* gate_up, const T* bias, int x_stride,
          float alpha, float limit) {
    let_next_start();
    const int lane = threadIdx.x % 32, row = blockIdx.y * WARPS + threadIdx.x / 32;
    const int pair = blockIdx.x;
    wait_for_previous();
    const int expert = ids[pair] - FIRST;
    if (row >= INNER || expert < 0 || expert >= COUNT) return;
    const T* source = x + (size_t)(pair / TOP_K) * x_stride;
    const size_t gate_row = (size_t)expert * 2 * INNER + row;
    float gate = warp_sum(partial<HIDDEN>(gate_up + gate_row * HIDDEN, source));
    float up = warp_sum(partial<HIDDEN>(gate_up + (gate_row + INNER) * HIDDEN, source));
#if UP_BIAS
    gate += to_float(bias[gate_row]);
    up += to_float(bias[gate_row + INNER]);
#endif
    if (lane == 0)
        activated[(size_t)pair * INNER + row] =
            expert_activation(rounded(gate), rounded(up), alpha, limit);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
expert_down(T* out, const T* activated, const int* ids, const float* weights, const T* down,
            const T* bias) {
    let_next_start();
    const int lane = threadIdx.x % 32, row = blockIdx.y * WARPS + threadIdx.x / 32;
    const size_t token = blockIdx.x;
    wait_for_previous();
    if (row >= HIDDEN) return;
    float total = 0;
    for (int choice = 0; choice < TOP_K; choice++) {
        const size_t pair = token * TOP_K + choice;
        const int expert = ids[pair] - FIRST;
        if (expert < 0 || expert >= COUNT) continue;
        const size_t at = (size_t)expert * HIDDEN + row;
        float product = warp_sum(partial<INNER>(down + at * INNER, activated + pair * INNER));
#if DOWN_BIAS
        product += to_float(bias[at]);
#endif
        total += weights[pair] * rounded(product);
    }
    if (lane == 0) out[token * HIDDEN + row] = from_float(total);
}
