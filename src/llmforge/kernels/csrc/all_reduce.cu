// The sum of x over ranks, in rank order, one precision up, rounded once; then what stands behind it
// in the graph: BIAS, + bias, rounded; ADD, + residual, rounded, which is kept in out_sum (in `out`
// without NORM); NORM, RMSNorm of that with `weight` (see norm.cu), in `out`.
//   RANKS: how many. FEATURES: elements of a token. RUN: elements that a block takes at once
//   (FEATURES with NORM).
//   WIDTH: elements a load. THREADS: block size. Grid: at most MAX_BLOCKS.
//   DIRECT: ranks write into each other's memory, else `parts` holds the x of all of them.
//   TWO_SHOT: each rank sums a share of every run for all, else each sums everything. That moves
//   2 (RANKS - 1) / RANKS of x instead of RANKS - 1 times x, and waits twice.
#include "common.cuh"
#include "exchange.cuh"

#define PACKS (RUN / WIDTH)
#define PER_THREAD ((PACKS + THREADS - 1) / THREADS)
typedef Pack<WIDTH> P;
#if defined(DTYPE_FLOAT32)
typedef double Wide;
#else
typedef float Wide;
#endif
DEVICE Wide widened(T x) { return (Wide)to_float(x); }
DEVICE T narrowed(float x) { return from_float(x); }
DEVICE T narrowed(double x) { return from_float((float)x); }

// The sum of `mine` and, from each other rank r, of parts[r * stride].
DEVICE P sum_of(P mine, const P* parts, size_t stride, int rank) {
    P each[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++)
        each[r] = r == rank ? mine : load_arrived(parts + r * stride);
    P result;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        Wide sum = widened(each[0].v[j]);
#pragma unroll
        for (int r = 1; r < RANKS; r++) sum += widened(each[r].v[j]);
        result.v[j] = narrowed(sum);
    }
    return result;
}

// The epilogue of a pack: bias and residual added, each sum rounded.
DEVICE P added(P value, size_t at, const T* bias, const T* residual) {
#if BIAS
    const P b = ((const P*)bias)[at % (FEATURES / WIDTH)];
#pragma unroll
    for (int j = 0; j < WIDTH; j++) value.v[j] = from_float(to_float(value.v[j]) + to_float(b.v[j]));
#endif
#if ADD
    const P other = ((const P*)residual)[at];
#pragma unroll
    for (int j = 0; j < WIDTH; j++)
        value.v[j] = from_float(to_float(value.v[j]) + to_float(other.v[j]));
#endif
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
all_reduce(T* out, T* out_sum, const T* x, const T* residual, const T* bias, const T* weight,
           const u64* table, const T* parts, int rank, int tokens, int slot_units, float eps) {
#if NORM
    __shared__ float scratch[32];
#endif
    let_next_start();
    const size_t total = (size_t)tokens * (FEATURES / WIDTH);
    const int runs = (total + PACKS - 1) / PACKS;
    const P* own = (const P*)x;
#if DIRECT
    Exchange exchange;
    exchange.open(table, rank);
    wait_for_previous();
    exchange.begin();
    const P* here = exchange.slot<P>(rank, slot_units);
#else
    wait_for_previous();
    const P* here = (const P*)parts;
#endif

#if TWO_SHOT
    // A slot: from each rank its part of this rank's share, [ranks, runs, share], then all sums.
    const int share = (PACKS + RANKS - 1) / RANKS;
    const size_t gathered = (size_t)RANKS * runs * share;
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
#pragma unroll 2
        for (int p = threadIdx.x; p < PACKS; p += THREADS) {
            const size_t at = (size_t)run * PACKS + p;
            const int owner = p / share;
            if (at >= total || owner == rank) continue;
            P* target = exchange.slot<P>(owner, slot_units);
            target[((size_t)rank * runs + run) * share + p % share] = own[at];
        }
    }
    exchange.meet(0, RANKS);
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
#pragma unroll 1
        for (int i = threadIdx.x; i < share; i += THREADS) {
            const int p = rank * share + i;
            const size_t at = (size_t)run * PACKS + p;
            if (p >= PACKS || at >= total) continue;
            const P* first = here + (size_t)run * share + i;
            const P sum = sum_of(own[at], first, (size_t)runs * share, rank);
#pragma unroll
            for (int r = 0; r < RANKS; r++)
                exchange.slot<P>(r, slot_units)[gathered + at] = sum;
        }
    }
    exchange.meet(1, RANKS);
#elif DIRECT
    // A slot: the x of each rank, [ranks, total].
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
#pragma unroll 2
        for (int p = threadIdx.x; p < PACKS; p += THREADS) {
            const size_t at = (size_t)run * PACKS + p;
            if (at >= total) continue;
            const P value = own[at];
#pragma unroll
            for (int r = 0; r < RANKS; r++)
                if (r != rank) exchange.slot<P>(r, slot_units)[rank * total + at] = value;
        }
    }
    exchange.meet(0, RANKS);
#endif

    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
#if NORM
        P kept[PER_THREAD];
        float squares = 0;
#pragma unroll
#else
#pragma unroll 1
#endif
        for (int k = 0; k < PER_THREAD; k++) {
            const int p = k * THREADS + threadIdx.x;
            const size_t at = (size_t)run * PACKS + p;
            if (p >= PACKS || at >= total) break;
#if TWO_SHOT
            P value = load_arrived(here + gathered + at);
#else
            P value = sum_of(own[at], here + at, total, rank);
#endif
            value = added(value, at, bias, residual);
#if NORM
            ((P*)out_sum)[at] = value;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) squares += to_float(value.v[j]) * to_float(value.v[j]);
            kept[k] = value;
#else
            ((P*)out)[at] = value;
#endif
        }
#if NORM
        const float scale = rsqrtf(block_sum(squares, scratch) / FEATURES + eps);
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            const int p = k * THREADS + threadIdx.x;
            if (p >= PACKS) break;
            const P w = ((const P*)weight)[p];
            P result;
#pragma unroll
            for (int j = 0; j < WIDTH; j++)
                result.v[j] = from_float(rounded(to_float(kept[k].v[j]) * scale) * to_float(w.v[j]));
            ((P*)out)[(size_t)run * PACKS + p] = result;
        }
        __syncthreads();  // `scratch` is free again
#endif
    }
#if DIRECT
    exchange.end();
#endif
}
