// Attention of 16 rows to tiles of 16 keys on the tensor cores (mma.m16n8k16), a warp each: what the
// kernels of attention share. ROWS: of the 16, those that are used.
#pragma once
#include "attention_chunks.cuh"

struct Rows {
    uint4 low, high;  // elements of rows g and g + 8
};

#define USED (ROWS > 8 ? 2 : 1)  // of a lane's two rows

struct State {
    float sum[HALVES * 8][4];  // [product][row g: columns 2t, 2t + 1; row g + 8: ...]
    float largest[2], total[2];
};

// Chunk 4s + t of this lane's rows `low` (g) and `high` (g + 8).
DEVICE Rows chunk_of(const T* low, const T* high, int s) {
    const int chunk = s * 4 + threadIdx.x % 4;
    return {load_chunk(low, chunk), USED > 1 ? load_chunk(high, chunk) : make_uint4(0, 0, 0, 0)};
}

// One tile of 16 keys from `base` on. `query(s)`: chunk 4s + t of a lane's rows; `keys(j, s)`: chunk
// 4s + t of key 8j + g; `values(j, h)`: chunk 8h + g of value 2t + j % 2 + j / 2 * 8. `between()`:
// what is to be done once the keys have been read, before the values are. `last[i]`: the position of
// row g (0) and g + 8 (1); keys outside [first, stop) or outside a row's reach count as minus
// infinity. `scaled(x)`: the exponent of 2 that a product counts with.
template <class Query, class Keys, class Values, class Scaled, class Between>
DEVICE void attend(State& state, Query query, Keys keys, Values values, int base, int first,
                   int stop, const int (&last)[2], Scaled scaled, Between between) {
    const int t = threadIdx.x % 4;
    float score[2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const Rows rows = query(s);
        const uint4 a = rows.low, b = rows.high;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 key = keys(j, s);
            mma(score[j], a.x, b.x, a.y, b.y, key.x, key.y);
            mma(score[j], a.z, b.z, a.w, b.w, key.z, key.w);
        }
    }
    between();
    u32 weights[4];
    float keep[2];
    if (USED == 1) weights[1] = weights[3] = 0, keep[1] = 0;
#pragma unroll
    for (int i = 0; i < USED; i++) {
        float bound = state.largest[i];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int key = base + j / 2 * 8 + 2 * t + j % 2;
            float& x = score[j / 2][2 * i + j % 2];
            bool visible = key >= first && key < stop && key <= last[i];
            if (WINDOW > 0) visible = visible && key > last[i] - WINDOW;
            x = visible ? scaled(x) : -INFINITY;
            bound = fmaxf(bound, x);
        }
        bound = fmaxf(bound, __shfl_xor_sync(FULL_WARP, bound, 1));
        bound = fmaxf(bound, __shfl_xor_sync(FULL_WARP, bound, 2));
        const float shift = bound == -INFINITY ? 0.0f : bound;
        keep[i] = exp2f(state.largest[i] - shift);
        state.largest[i] = bound;
        float added = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float& x = score[j / 2][2 * i + j % 2];
            x = exp2f(x - shift);
            added += x;
        }
        state.total[i] = state.total[i] * keep[i] + added;
        weights[i] = packed(score[0][2 * i], score[0][2 * i + 1]);
        weights[2 + i] = packed(score[1][2 * i], score[1][2 * i + 1]);
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        uint4 value[4];
#pragma unroll
        for (int j = 0; j < 4; j++) value[j] = values(j, h);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float(&sum)[4] = state.sum[h * 8 + e];
            sum[0] *= keep[0], sum[1] *= keep[0], sum[2] *= keep[1], sum[3] *= keep[1];
            const u32 halves = e % 2 ? 0x7632 : 0x5410;
            const u32 b0 = __byte_perm(word(value[0], e / 2), word(value[1], e / 2), halves);
            const u32 b1 = __byte_perm(word(value[2], e / 2), word(value[3], e / 2), halves);
            mma(sum, weights[0], weights[1], weights[2], weights[3], b0, b1);
        }
    }
}

// The same where all rows reach the last key.
template <class Query, class Keys, class Values, class Scaled, class Between>
DEVICE void attend(State& state, Query query, Keys keys, Values values, int base, int first,
                   int stop, Scaled scaled, Between between) {
    const int last[2] = {stop - 1, stop - 1};
    attend(state, query, keys, values, base, first, stop, last, scaled, between);
}

DEVICE void begin(State& state) {
#pragma unroll
    for (int i = 0; i < HALVES * 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) state.sum[i][j] = 0;
    }
    state.largest[0] = state.largest[1] = -INFINITY;
    state.total[0] = state.total[1] = 0;
}

DEVICE void finish_totals(State& state) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        state.total[i] += __shfl_xor_sync(FULL_WARP, state.total[i], 1);
        state.total[i] += __shfl_xor_sync(FULL_WARP, state.total[i], 2);
    }
}

// Calls `store(row, d, x)` for four sums x at a time, from dimension d of a row on, and
// `ends(row, largest, total)` once a row.
template <class Store, class Ends>
DEVICE void each_sum(const State& state, Store store, Ends ends) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < USED; i++) {
        const int row = g + 8 * i;
#pragma unroll
        for (int p = 0; p < HALVES * 8; p += 4) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int d = p / 8 * 64 + 16 * t + 8 * c + p % 8, k = 2 * i + c;
                const float4 x = make_float4(state.sum[p][k], state.sum[p + 1][k],
                                             state.sum[p + 2][k], state.sum[p + 3][k]);
                if (d < HEAD_DIM) store(row, d, x);
            }
        }
        if (t == 0) ends(row, state.largest[i], state.total[i]);
    }
}
