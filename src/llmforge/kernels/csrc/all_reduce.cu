// The sum of x over ranks, in rank order, one precision up, rounded once; then what stands behind it
// in the graph: BIAS, + bias, rounded; ADD, + residual, rounded, which is kept in out_sum (in `out`
// without NORM); NORM, RMSNorm of that with `weight` (see norm.cu), in `out`.
//   FEATURES: elements of a token. RUN: elements that a block takes at once (FEATURES with NORM).
//   WIDTH: elements a load. THREADS: block size. Grid: at most MAX_BLOCKS.
//   DIRECT: ranks write into each other's memory, else `parts` holds the x of all of them.
//   TWO_SHOT: each rank sums a share of every run for all, else each sums everything. That moves
//   2 (ranks - 1) / ranks of x instead of ranks - 1 times x, and waits twice.
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
DEVICE P sum_of(P mine, const P* parts, size_t stride, int rank, int ranks) {
    P each[MAX_RANKS];
#pragma unroll
    for (int r = 0; r < MAX_RANKS; r++)
        if (r < ranks) each[r] = r == rank ? mine : load_arrived(parts + r * stride);
    P result;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        Wide sum = widened(each[0].v[j]);
#pragma unroll
        for (int r = 1; r < MAX_RANKS; r++)
            if (r < ranks) sum += widened(each[r].v[j]);
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

extern "C" __global__ void __launch_bounds__(THREADS)
all_reduce(T* out, T* out_sum, const T* x, const T* residual, const T* bias, const T* weight,
           const u64* table, const T* parts, int rank, int ranks, int tokens, int slot_units,
           float eps) {
    __shared__ float scratch[32];
    let_next_start();
    const size_t total = (size_t)tokens * (FEATURES / WIDTH);
    const int runs = (total + PACKS - 1) / PACKS;
    const P* own = (const P*)x;
#if DIRECT
    Exchange exchange;
    exchange.open(table, rank, ranks);
    wait_for_previous();
    exchange.begin();
    char* slots[MAX_RANKS];
#pragma unroll
    for (int r = 0; r < MAX_RANKS; r++)
        slots[r] = r < ranks ? slot_of(exchange.region[r], exchange.number, slot_units) : 0;
    P* here = (P*)exchange.slot(rank, slot_units);
#else
    wait_for_previous();
    const P* here = (const P*)parts;
#endif

#if TWO_SHOT
    // A slot: from each rank its part of this rank's share, [ranks, runs, share], then all sums.
    const int share = (PACKS + ranks - 1) / ranks;
    const size_t gathered = (size_t)ranks * runs * share;
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
        for (int p = threadIdx.x; p < PACKS; p += THREADS) {
            const size_t at = (size_t)run * PACKS + p;
            const int owner = p / share;
            if (at >= total || owner == rank) continue;
            P* target = (P*)exchange.slot(owner, slot_units);
            target[((size_t)rank * runs + run) * share + p % share] = own[at];
        }
    }
    exchange.meet(0);
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
        for (int i = threadIdx.x; i < share; i += THREADS) {
            const int p = rank * share + i;
            const size_t at = (size_t)run * PACKS + p;
            if (p >= PACKS || at >= total) continue;
            const P* first = here + (size_t)run * share + i;
            const P sum = sum_of(own[at], first, (size_t)runs * share, rank, ranks);
#pragma unroll
            for (int r = 0; r < MAX_RANKS; r++)
                if (r < ranks) ((P*)slots[r])[gathered + at] = sum;
        }
    }
    exchange.meet(1);
#elif DIRECT
    // A slot: the x of each rank, [ranks, total].
    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
        for (int p = threadIdx.x; p < PACKS; p += THREADS) {
            const size_t at = (size_t)run * PACKS + p;
            if (at >= total) continue;
            const P value = own[at];
#pragma unroll
            for (int r = 0; r < MAX_RANKS; r++)
                if (r < ranks && r != rank) ((P*)slots[r])[rank * total + at] = value;
        }
    }
    exchange.meet(0);
#endif

    for (int run = blockIdx.x; run < runs; run += gridDim.x) {
        P kept[PER_THREAD];
        float squares = 0;
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            const int p = k * THREADS + threadIdx.x;
            const size_t at = (size_t)run * PACKS + p;
            if (p >= PACKS || at >= total) break;
#if TWO_SHOT
            P value = load_arrived(here + gathered + at);
#else
            P value = sum_of(own[at], here + at, total, rank, ranks);
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
