// Attention over the paged cache, one warp a (token, query head): any dtype and head size, prefill
// and decode alike. The fallback for what attention_mma.cu does not cover; all in float32.
//   HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TABLE_STRIDE as in qkv.cu. WINDOW: positions attended to,
//   0 for all. WARPS: warps a block. CAP: scores are capped, soft_cap tanh(score / soft_cap).
//   SLOPES: then lowered by slopes[head] for each position of distance. SINKS: each head has one more
//   key, whose score is sinks[head] and whose value is zero. Grid: tokens * HEADS / WARPS.
#include "common.cuh"

#define PER_LANE ((HEAD_DIM + 31) / 32)

extern "C" __global__ void __launch_bounds__(WARPS * 32)
attention_simple(T* out, const T* q, const T* key_cache, const T* value_cache,
                 const int* query_starts, const int* kv_lens, const int* block_table, int tokens,
                 int sequences, float scale, float soft_cap, const float* slopes,
                 const T* sinks) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32;
    const int index = blockIdx.x * WARPS + threadIdx.x / 32;
    const int token = index / HEADS, head = index % HEADS;
    if (token >= tokens) return;
    const int sequence = sequence_of(query_starts, sequences, token);
    const int position = kv_lens[sequence] - (query_starts[sequence + 1] - token);
    const int first = WINDOW > 0 ? max(0, position - WINDOW + 1) : 0;
    const int* blocks = block_table + (size_t)sequence * TABLE_STRIDE;
    const int kv_head = head / (HEADS / KV_HEADS);
    float query[PER_LANE], sum[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = i * 32 + lane;
        query[i] = d < HEAD_DIM ? to_float(q[(size_t)index * HEAD_DIM + d]) * scale : 0.0f;
        sum[i] = 0;
    }
    float largest = -INFINITY, total = 0;
    for (int key = first; key <= position; key++) {
        const size_t slot = (size_t)blocks[key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
        const size_t row = (slot * KV_HEADS + kv_head) * HEAD_DIM;
        float score = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = i * 32 + lane;
            if (d < HEAD_DIM) score += query[i] * to_float(key_cache[row + d]);
        }
        score = warp_sum(score);
#if CAP
        score = soft_cap * tanhf(score / soft_cap);
#endif
#if SLOPES
        score -= slopes[head] * (position - key);
#endif
        const float bound = fmaxf(largest, score);
        const float weight = expf(score - bound), keep = expf(largest - bound);
        largest = bound;
        total = total * keep + weight;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = i * 32 + lane;
            if (d < HEAD_DIM) sum[i] = sum[i] * keep + weight * to_float(value_cache[row + d]);
        }
    }
#if SINKS
    const float sink = to_float(sinks[head]), bound = fmaxf(largest, sink);
    total = total * expf(largest - bound) + expf(sink - bound);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) sum[i] *= expf(largest - bound);
#endif
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = i * 32 + lane;
        if (d < HEAD_DIM) out[(size_t)index * HEAD_DIM + d] = from_float(sum[i] / total);
    }
}
