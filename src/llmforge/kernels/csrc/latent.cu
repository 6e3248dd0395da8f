// Attention over a cache of latents [blocks, BLOCK_SIZE, RANK + DIM], which are the keys of all heads
// and, their first RANK elements, the values (multi-head latent attention with what makes keys and
// values of latents moved to the queries and to the result: https://arxiv.org/abs/2405.04434).
// `store_latents`: the new tokens' latent | k_rope into the cache. Grid: tokens; 128 threads.
// `latent_attention`: a block has one token and SHARED of its heads; its warps share the keys.
// Grid: (HEADS / SHARED, tokens). All in float32. TABLE_STRIDE, BLOCK_SIZE as in qkv.cu.
#include "common.cuh"

#define SIZE (RANK + DIM)
#define PER_LANE ((SIZE + 31) / 32)
#define VALUES ((RANK + 31) / 32)

extern "C" __global__ void __launch_bounds__(128)
store_latents(T* cache, const T* latent, const T* k_rope, const int* positions,
              const int* query_starts, const int* block_table, int sequences, int latent_stride,
              int k_rope_stride) {
    let_next_start();
    wait_for_previous();
    const size_t token = blockIdx.x;
    const int sequence = sequence_of(query_starts, sequences, token), position = positions[token];
    const int block = block_table[(size_t)sequence * TABLE_STRIDE + position / BLOCK_SIZE];
    T* target = cache + ((size_t)block * BLOCK_SIZE + position % BLOCK_SIZE) * SIZE;
    for (int i = threadIdx.x; i < SIZE; i += 128)
        target[i] = i < RANK ? latent[token * latent_stride + i]
                             : k_rope[token * k_rope_stride + i - RANK];
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
latent_attention(T* out, const T* q, const T* q_rope, const T* cache, const int* query_starts,
                 const int* kv_lens, const int* block_table, int sequences, int q_stride,
                 int q_rope_stride, float scale) {
    __shared__ float parts[WARPS][SHARED][RANK + 2];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_head = blockIdx.x * SHARED;
    const size_t token = blockIdx.y;
    wait_for_previous();
    const int sequence = sequence_of(query_starts, sequences, token);
    const int position = kv_lens[sequence] - (query_starts[sequence + 1] - (int)token);
    const int* blocks = block_table + (size_t)sequence * TABLE_STRIDE;
    float query[SHARED][PER_LANE], sum[SHARED][VALUES], largest[SHARED], total[SHARED];
#pragma unroll
    for (int h = 0; h < SHARED; h++) {
        largest[h] = -INFINITY, total[h] = 0;
#pragma unroll
        for (int i = 0; i < VALUES; i++) sum[h][i] = 0;
        const int head = first_head + h;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = i * 32 + lane;
            float value = 0;
            if (d < RANK) value = to_float(q[token * q_stride + head * RANK + d]);
            else if (d < SIZE) value = to_float(q_rope[token * q_rope_stride + head * DIM + d - RANK]);
            query[h][i] = value * scale;
        }
    }
    for (int key = warp; key <= position; key += WARPS) {
        const size_t slot = (size_t)blocks[key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
        float row[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = i * 32 + lane;
            row[i] = d < SIZE ? to_float(cache[slot * SIZE + d]) : 0.0f;
        }
#pragma unroll
        for (int h = 0; h < SHARED; h++) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) score += query[h][i] * row[i];
            score = warp_sum(score);
            const float bound = fmaxf(largest[h], score);
            const float weight = expf(score - bound), keep = expf(largest[h] - bound);
            largest[h] = bound;
            total[h] = total[h] * keep + weight;
#pragma unroll
            for (int i = 0; i < VALUES; i++) sum[h][i] = sum[h][i] * keep + weight * row[i];
        }
    }
#pragma unroll
    for (int h = 0; h < SHARED; h++) {
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (i * 32 + lane < RANK) parts[warp][h][i * 32 + lane] = sum[h][i];
        if (lane == 0) parts[warp][h][RANK] = largest[h], parts[warp][h][RANK + 1] = total[h];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SHARED * RANK; i += WARPS * 32) {
        const int h = i / RANK, d = i % RANK;
        float bound = -INFINITY, joined = 0, weights = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) bound = fmaxf(bound, parts[w][h][RANK]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = expf(parts[w][h][RANK] - bound);
            joined += weight * parts[w][h][d];
            weights += weight * parts[w][h][RANK + 1];
        }
        out[(token * HEADS + first_head + h) * RANK + d] = from_float(joined / weights);
    }
}
