// What qkv.cu does, but for norms, 16 bytes at a time: a thread has of a head 8 neighbouring elements of
// those that are rotated and the 8 that they are rotated with, or 16 neighbours that are not rotated.
//   BIAS, ROPE_DIM, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TABLE_STRIDE as there; HEAD_DIM and ROPE_DIM
//   are multiples of 16, and all rows and the bias begin at multiples of 16 bytes. THREADS: of a block.
// The arguments are qkv.cu's, of which weights and eps are not used. Grid: tokens.
#include "common.cuh"

#define ALL_HEADS (HEADS + 2 * KV_HEADS)
#define PAIRS (HEAD_DIM / 16)
#define TURNED (ROPE_DIM / 16)  // pairs that are rotated
#define TOGETHER (THREADS / PAIRS)  // heads that the block has at a time
#define ROUNDS ((ALL_HEADS + TOGETHER - 1) / TOGETHER)

typedef Pack<8> Eight;

DEVICE void add_bias(Eight& x, const T* bias) {
    const Eight other = *(const Eight*)bias;
#pragma unroll
    for (int i = 0; i < 8; i++) x.v[i] = from_float(to_float(x.v[i]) + to_float(other.v[i]));
}

struct alignas(16) Angles {
    float cosine[8], sine[8];
};

DEVICE void rotate(Eight& low, Eight& high, const Angles& angles) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float first = to_float(low.v[i]), second = to_float(high.v[i]);
        low.v[i] = from_float(first * angles.cosine[i] - second * angles.sine[i]);
        high.v[i] = from_float(second * angles.cosine[i] + first * angles.sine[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
qkv(T* q_out, T* key_cache, T* value_cache, const T* q, const T* k, const T* v, const T* bias,
    const T* q_weight, const T* k_weight, const float* table, const int* positions,
    const int* query_starts, const int* block_table, int sequences, int q_stride, int k_stride,
    int v_stride, float eps) {
    let_next_start();
    const int pair = threadIdx.x % PAIRS, first_head = threadIdx.x / PAIRS;
    const bool turned = pair < TURNED;
    const int low_at = turned ? pair * 8 : ROPE_DIM + (pair - TURNED) * 16;
    const int high_at = turned ? low_at + ROPE_DIM / 2 : low_at + 8;
    const size_t token = blockIdx.x;
    wait_for_previous();
    if (first_head >= TOGETHER) return;
    Eight low[ROUNDS], high[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {  // all asked for before any is used
        const int head = first_head + r * TOGETHER;
        if (head >= ALL_HEADS) break;
        const T* source = head < HEADS ? q + token * q_stride + head * HEAD_DIM
                          : head < HEADS + KV_HEADS
                              ? k + token * k_stride + (head - HEADS) * HEAD_DIM
                              : v + token * v_stride + (head - HEADS - KV_HEADS) * HEAD_DIM;
        low[r] = *(const Eight*)(source + low_at);
        high[r] = *(const Eight*)(source + high_at);
    }
    Angles angles;
    if (turned) {
        const float* own = table + token * ROPE_DIM + pair * 8;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            *(float4*)(angles.cosine + i) = *(const float4*)(own + i);
            *(float4*)(angles.sine + i) = *(const float4*)(own + ROPE_DIM / 2 + i);
        }
    }
    const int sequence = sequence_of(query_starts, sequences, token), position = positions[token];
    const int block = block_table[(size_t)sequence * TABLE_STRIDE + position / BLOCK_SIZE];
    const size_t slot = (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int head = first_head + r * TOGETHER;
        if (head >= ALL_HEADS) break;
#if BIAS
        add_bias(low[r], bias + head * HEAD_DIM + low_at);
        add_bias(high[r], bias + head * HEAD_DIM + high_at);
#endif
        if (turned && head < HEADS + KV_HEADS) rotate(low[r], high[r], angles);
        T* target = head < HEADS ? q_out + (token * HEADS + head) * HEAD_DIM
                    : head < HEADS + KV_HEADS
                        ? key_cache + (slot * KV_HEADS + head - HEADS) * HEAD_DIM
                        : value_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM;
        *(Eight*)(target + low_at) = low[r];
        *(Eight*)(target + high_at) = high[r];
    }
}
