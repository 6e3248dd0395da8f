// From the rows of a merged q|k|v product to attention's inputs, in one kernel: add the bias, norm
// q and k heads, rotate them, write q to `q_out` and k and v into the paged cache.
//   BIAS, NORM: whether there is a bias and a norm of q and k heads. ROPE_DIM: rotated elements of a
//   head, 0 for none. HEADS, KV_HEADS, HEAD_DIM: the shape. BLOCK_SIZE: tokens of a cache block.
//   TABLE_STRIDE: columns of the block table. WARPS: heads a block.
// q, k, v: inputs [tokens, heads * HEAD_DIM] with row strides (they may be parts of one matrix).
// Caches [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]. Grid: (tokens, all heads / WARPS).
#include "common.cuh"
#include "qkv.cuh"

#define ALL_HEADS (HEADS + 2 * KV_HEADS)

extern "C" __global__ void __launch_bounds__(WARPS * 32)
qkv(T* q_out, T* key_cache, T* value_cache, const T* q, const T* k, const T* v, const T* bias,
    const T* q_weight, const T* k_weight, const float* table, const int* positions,
    const int* query_starts, const int* block_table, int sequences, int q_stride, int k_stride,
    int v_stride, float eps) {
    __shared__ float staged[WARPS][HEAD_DIM];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = blockIdx.y * WARPS + warp;
    const size_t token = blockIdx.x;
    wait_for_previous();
    if (head >= ALL_HEADS) return;
    const bool is_q = head < HEADS, is_v = head >= HEADS + KV_HEADS;
    const int local = is_q ? head : (head - HEADS) % KV_HEADS;
    const T* source = is_q   ? q + token * q_stride
                      : is_v ? v + token * v_stride
                             : k + token * k_stride;
    source += local * HEAD_DIM;
    float(&x)[HEAD_DIM] = staged[warp];
    load_head(x, lane, source, bias, head * HEAD_DIM, !is_v, is_q ? q_weight : k_weight, eps);
    T* target = q_out + (token * HEADS + local) * HEAD_DIM;
    if (!is_q) {
        const int sequence = sequence_of(query_starts, sequences, token);
        const int position = positions[token];
        const int block = block_table[(size_t)sequence * TABLE_STRIDE + position / BLOCK_SIZE];
        const size_t slot = (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
        target = (is_v ? value_cache : key_cache) + (slot * KV_HEADS + local) * HEAD_DIM;
    }
    store_head(target, x, lane, table, token, is_v ? 0 : ROPE_DIM);
}
