// Attention over the paged cache on the tensor cores (mma.m16n8k16): prefill, chunked prefill and
// decode. A warp computes 16 rows: the GROUP query heads of one kv head for 16 / GROUP tokens.
//   GROUP: query heads a kv head, at most 16. HEAD_DIM: a multiple of 8, at most 128. BLOCK_SIZE,
//   TABLE_STRIDE, HEADS, KV_HEADS as in qkv.cu. WINDOW: positions attended to, 0 for all. WARPS.
//   OVER_KEYS 0: each warp has rows of its own; grid (row tiles / WARPS, KV_HEADS, sequences).
//   OVER_KEYS 1: one token a sequence; the warps, and `splits` blocks, share its keys, and the block
//     that finishes last joins the splits; grid (KV_HEADS, sequences, splits).
//     partial: [sequences, KV_HEADS, splits, GROUP, HEAD_DIM + 2] float32; counters: one a
//     (sequence, kv head), zero before and after.
//
// Keys and values go from global memory straight into fragments, 16 bytes a load.
#include "common.cuh"

#define ROWS 16
#include "attention_tile.cuh"

#define TOKENS (16 / GROUP)

// One tile of 16 keys from `base` on, as the other `attend`.
DEVICE void attend(State& state, const Rows (&query)[STEPS], const T* key_cache,
                   const T* value_cache, const int* blocks, int kv_head, int base, int first,
                   int stop, const int (&last)[2], float scale_log2) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto row_of = [&](const T* cache, int key) {
        key = min(key, stop - 1);
        const size_t slot = (size_t)blocks[key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
        return cache + (slot * KV_HEADS + kv_head) * HEAD_DIM;
    };
    uint4 keys[2][STEPS], values[4][HALVES];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const T* row = row_of(key_cache, base + 8 * j + g);
#pragma unroll
        for (int s = 0; s < STEPS; s++) keys[j][s] = load_chunk(row, s * 4 + t);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const T* row = row_of(value_cache, base + 2 * t + j % 2 + j / 2 * 8);
#pragma unroll
        for (int h = 0; h < HALVES; h++) values[j][h] = load_chunk(row, h * 8 + g);
    }
    attend(
        state, [&](int s) { return query[s]; }, [&](int j, int s) { return keys[j][s]; },
        [&](int j, int h) { return values[j][h]; }, base, first, stop, last,
        [&](float x) { return x * scale_log2; }, [] {});
}

DEVICE void begin(State& state, Rows (&query)[STEPS], const T* q, const int (&token)[2],
                  const int (&head)[2]) {
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        query[s] = chunk_of(q + ((size_t)token[0] * HEADS + head[0]) * HEAD_DIM,
                            q + ((size_t)token[1] * HEADS + head[1]) * HEAD_DIM, s);
    begin(state);
}

#if OVER_KEYS

// Joins softmax parts: `count` of them, `stride` floats apart, each [HEAD_DIM + 2]: weighted sum,
// largest score, total weight.
DEVICE void join(const float* parts, int count, size_t stride, int d, float& sum, float& largest,
                 float& total) {
    largest = -INFINITY;
    for (int i = 0; i < count; i++) largest = fmaxf(largest, __ldcg(parts + i * stride + HEAD_DIM));
    const float shift = largest == -INFINITY ? 0.0f : largest;
    sum = total = 0;
    for (int i = 0; i < count; i++) {
        const float* part = parts + i * stride;
        const float weight = exp2f(__ldcg(part + HEAD_DIM) - shift);
        sum += weight * __ldcg(part + d);
        total += weight * __ldcg(part + HEAD_DIM + 1);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
attention(T* out, const T* q, const T* key_cache, const T* value_cache, const int* query_starts,
          const int* kv_lens, const int* block_table, float* partial, int* counters, float scale) {
    __shared__ float parts[WARPS][GROUP][HEAD_DIM + 2];
    __shared__ int arrived;
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.x, sequence = blockIdx.y, split = blockIdx.z;
    wait_for_previous();
    const int kv_len = kv_lens[sequence];
    const int first = WINDOW > 0 ? max(0, kv_len - WINDOW) : 0;
    // Tiles start at multiples of 16; each split has whole rounds of the warps' tiles.
    const int start = first / 16 * 16;
    const int round = 16 * WARPS;
    const int rounds = (kv_len - start + round - 1) / round;
    const int each = (rounds + gridDim.z - 1) / gridDim.z * round;
    const int splits = (kv_len - start + each - 1) / each;
    if (split >= splits) return;
    const int token[2] = {sequence, sequence};
    const int head[2] = {kv_head * GROUP + min(g, GROUP - 1), kv_head * GROUP + min(g + 8, GROUP - 1)};
    const int last[2] = {kv_len - 1, kv_len - 1};
    const int* blocks = block_table + (size_t)sequence * TABLE_STRIDE;
    State state;
    Rows query[STEPS];
    begin(state, query, q, token, head);
    const int end = min(kv_len, start + (split + 1) * each);
    for (int base = start + split * each + warp * 16; base < end; base += round)
        attend(state, query, key_cache, value_cache, blocks, kv_head, base, first, kv_len, last,
               scale * LOG2_E);
    finish_totals(state);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = g + 8 * i;
        if (row >= GROUP) continue;
        float* part = parts[warp][row];
#pragma unroll
        for (int p = 0; p < HALVES * 8; p++) {
            const int d = p / 8 * 64 + 16 * t + p % 8;
            if (d < HEAD_DIM) part[d] = state.sum[p][2 * i];
            if (d + 8 < HEAD_DIM) part[d + 8] = state.sum[p][2 * i + 1];
        }
        if (t == 0) part[HEAD_DIM] = state.largest[i], part[HEAD_DIM + 1] = state.total[i];
    }
    __syncthreads();
    const size_t pair = (size_t)sequence * KV_HEADS + kv_head;
    const size_t part_size = GROUP * (HEAD_DIM + 2);
    float* mine = partial + (pair * gridDim.z + split) * part_size;
    T* out_rows = out + ((size_t)sequence * HEADS + kv_head * GROUP) * HEAD_DIM;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += WARPS * 32) {
        const int row = i / HEAD_DIM, d = i % HEAD_DIM;
        float sum, largest, total;
        largest = -INFINITY;
#pragma unroll
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, parts[w][row][HEAD_DIM]);
        sum = total = 0;
        const float shift = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2f(parts[w][row][HEAD_DIM] - shift);
            sum += weight * parts[w][row][d];
            total += weight * parts[w][row][HEAD_DIM + 1];
        }
        if (splits == 1) {
            out_rows[i] = from_float(sum / total);
        } else {
            mine[row * (HEAD_DIM + 2) + d] = sum;
            if (d == 0) {
                mine[row * (HEAD_DIM + 2) + HEAD_DIM] = largest;
                mine[row * (HEAD_DIM + 2) + HEAD_DIM + 1] = total;
            }
        }
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counters + pair, 1);
        if (arrived == splits - 1) counters[pair] = 0;
    }
    __syncthreads();
    if (arrived != splits - 1) return;
    __threadfence();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += WARPS * 32) {
        float sum, largest, total;
        const float* parts_of_row =
            partial + pair * gridDim.z * part_size + i / HEAD_DIM * (HEAD_DIM + 2);
        join(parts_of_row, splits, part_size, i % HEAD_DIM, sum, largest, total);
        out_rows[i] = from_float(sum / total);
    }
}

#else

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
attention(T* out, const T* q, const T* key_cache, const T* value_cache, const int* query_starts,
          const int* kv_lens, const int* block_table, float scale) {
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.y, sequence = blockIdx.z;
    wait_for_previous();
    const int start = query_starts[sequence], count = query_starts[sequence + 1] - start;
    // The last tiles have the most keys: they go first.
    const int tile = (gridDim.x - 1 - blockIdx.x) * WARPS + warp;
    const int offset = tile * TOKENS;
    if (offset >= count) return;
    const int kv_len = kv_lens[sequence];
    int token[2], head[2], last[2];
    bool wanted[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = g + 8 * i, at = offset + row / GROUP;
        wanted[i] = row < TOKENS * GROUP && at < count;
        const int valid = wanted[i] ? at : offset;
        token[i] = start + valid;
        head[i] = kv_head * GROUP + row % GROUP;
        last[i] = kv_len - count + valid;
    }
    const int* blocks = block_table + (size_t)sequence * TABLE_STRIDE;
    State state;
    Rows query[STEPS];
    begin(state, query, q, token, head);
    const int first_last = kv_len - count + offset;  // the position of the tile's first token
    const int first = WINDOW > 0 ? max(0, first_last - WINDOW + 1) : 0;
    const int stop = min(kv_len, first_last + TOKENS);
    for (int base = first / 16 * 16; base < stop; base += 16)
        attend(state, query, key_cache, value_cache, blocks, kv_head, base, first, stop, last,
               scale * LOG2_E);
    finish_totals(state);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!wanted[i]) continue;
        uint4* row = (uint4*)(out + ((size_t)token[i] * HEADS + head[i]) * HEAD_DIM);
        const float scale_out = 1.0f / state.total[i];
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int chunk = 8 * h + 2 * t + c;
                u32 words[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    words[e] = packed(state.sum[h * 8 + 2 * e][2 * i + c] * scale_out,
                                      state.sum[h * 8 + 2 * e + 1][2 * i + c] * scale_out);
                if (chunk < CHUNKS) row[chunk] = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

#endif
