// out_sum = (the sum of the parts of a product) + residual, each rounded; out = RMSNorm(out_sum) weight,
// as norm.cu. The parts are added in their order.
//   FEATURES: a multiple of 8. PARTS. PART_ROWS: rows of a part, of which the first are used. THREADS.
// parts [PARTS, PART_ROWS, FEATURES] float32, the others [rows, FEATURES]. Grid: rows.
#include "common.cuh"

#define PACKS ((FEATURES / 8 + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS)
parts_norm(T* out, T* out_sum, const float* parts, const T* residual, const T* weight, float eps) {
    __shared__ float scratch[32];
    let_next_start();
    const size_t row = (size_t)blockIdx.x * FEATURES;
    wait_for_previous();
    uint4 kept[PACKS];
    float squares = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int first = (p * THREADS + threadIdx.x) * 8;
        if (first >= FEATURES) break;
        float4 values[PARTS][2];
#pragma unroll
        for (int i = 0; i < PARTS * 2; i++)
            values[i / 2][i % 2] = __ldcg((const float4*)(
                parts + (size_t)(i / 2) * PART_ROWS * FEATURES + row + first + i % 2 * 4));
        const uint4 other = __ldcg((const uint4*)(residual + row + first));
        float sums[8] = {};
#pragma unroll
        for (int i = 0; i < PARTS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                sums[4 * h] += values[i][h].x, sums[4 * h + 1] += values[i][h].y;
                sums[4 * h + 2] += values[i][h].z, sums[4 * h + 3] += values[i][h].w;
            }
        auto total = [&](int i, u32 pair) {
            return packed(rounded(sums[i]) + low_half(pair), rounded(sums[i + 1]) + high_half(pair));
        };
        kept[p] = make_uint4(total(0, other.x), total(2, other.y), total(4, other.z),
                             total(6, other.w));
        *(uint4*)(out_sum + row + first) = kept[p];
        squares += sum_of_squares(kept[p]);
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / FEATURES + eps);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int first = (p * THREADS + threadIdx.x) * 8;
        if (first >= FEATURES) break;
        *(uint4*)(out + row + first) = normed(kept[p], *(const uint4*)(weight + first), scale);
    }
}
