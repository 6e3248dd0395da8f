// Attention of up to 8 rows to tiles of 16 keys, a warp each, as attention_tile.cuh has it for 16: the
// rows are the 8 columns of mma.m16n8k16, keys and then dimensions its 16 rows, so nothing of a
// product is thrown away and a lane has half as many sums. A lane (g = lane / 4, t = lane % 4) has of
// the scores those of keys g and g + 8 for rows 2t and 2t + 1, and the same rows' sums.
#pragma once
#include "attention_chunks.cuh"

struct State {
    float sum[HALVES][4][4];  // [half][e / 2]: dimension 64 h + 8 g + e of both rows, then e + 1
    float largest[2], total[2];
};

// What `query(s)` gives: chunk 4s + t of row g.
typedef uint4 QueryChunk;
DEVICE QueryChunk query_chunk(const T* low, const T*, int s) {
    return load_chunk(low, s * 4 + threadIdx.x % 4);
}

// As the `attend` of 16 rows; all of them reach the last key.
template <class Query, class Keys, class Values, class Scaled, class Between>
DEVICE void attend(State& state, Query query, Keys keys, Values values, int base, int first,
                   int stop, Scaled scaled, Between between) {
    const int g = threadIdx.x % 32 / 4;
    float score[4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const uint4 low = keys(0, s), high = keys(1, s), row = query(s);
        mma(score, low.x, high.x, low.y, high.y, row.x, row.y);
        mma(score, low.z, high.z, low.w, high.w, row.z, row.w);
    }
    between();
    float keep[2];
    bool visible[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int key = base + g + 8 * j;
        visible[j] = key >= first && key < stop;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float &low = score[i], &high = score[2 + i];
        low = visible[0] ? scaled(low) : -INFINITY;
        high = visible[1] ? scaled(high) : -INFINITY;
        float bound = fmaxf(state.largest[i], fmaxf(low, high));
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2)
            bound = fmaxf(bound, __shfl_xor_sync(FULL_WARP, bound, offset));
        const float shift = bound == -INFINITY ? 0.0f : bound;
        keep[i] = exp2f(state.largest[i] - shift);
        state.largest[i] = bound;
        low = exp2f(low - shift), high = exp2f(high - shift);
        state.total[i] = state.total[i] * keep[i] + (low + high);
    }
    // From a row of keys to a row of rows: keys 2t, 2t + 1 (and 8 more) for row g.
    const u32 low_keys = transposed(packed(score[0], score[1]));
    const u32 high_keys = transposed(packed(score[2], score[3]));
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        uint4 value[4];
#pragma unroll
        for (int j = 0; j < 4; j++) value[j] = values(j, h);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float(&sum)[4] = state.sum[h][p];
            sum[0] *= keep[0], sum[1] *= keep[1], sum[2] *= keep[0], sum[3] *= keep[1];
            const u32 a = word(value[0], p), b = word(value[1], p);
            const u32 c = word(value[2], p), d = word(value[3], p);
            mma(sum, __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632), low_keys, high_keys);
        }
    }
}

DEVICE void begin(State& state) {
#pragma unroll
    for (int i = 0; i < HALVES * 16; i++) state.sum[i / 16][i / 4 % 4][i % 4] = 0;
    state.largest[0] = state.largest[1] = -INFINITY;
    state.total[0] = state.total[1] = 0;
}

DEVICE void finish_totals(State& state) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2)
            state.total[i] += __shfl_xor_sync(FULL_WARP, state.total[i], offset);
    }
}

// Calls `store(row, d, x)` for four sums x at a time, from dimension d of a row on, and
// `ends(row, largest, total)` once a row.
template <class Store, class Ends>
DEVICE void each_sum(const State& state, Store store, Ends ends) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = 2 * t + i;
#pragma unroll
        for (int p = 0; p < HALVES * 2; p++) {
            const int d = 64 * (p / 2) + 8 * g + p % 2 * 4;
            const float(&low)[4] = state.sum[p / 2][p % 2 * 2];
            const float(&high)[4] = state.sum[p / 2][p % 2 * 2 + 1];
            if (d < HEAD_DIM) store(row, d, make_float4(low[i], low[2 + i], high[i], high[2 + i]));
        }
        if (g == 0) ends(row, state.largest[i], state.total[i]);
    }
}
