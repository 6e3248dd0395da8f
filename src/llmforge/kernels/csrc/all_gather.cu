// The features of all ranks side by side: out [rows, SIZE] from x [rows, LOCAL] of each rank; what is
// beyond SIZE is padding and left out. DIRECT, RANKS and WIDTH as in all_reduce.cu. THREADS: block size.
// Grid: at most MAX_BLOCKS.
#include "common.cuh"
#include "exchange.cuh"

#define PACKS (LOCAL / WIDTH)
typedef Pack<WIDTH> P;

extern "C" __global__ void __launch_bounds__(THREADS)
all_gather(T* out, const T* x, const u64* table, const T* parts, int rank, int rows,
           int slot_units) {
    let_next_start();
    const int total = rows * PACKS;
    const int first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    const P* own = (const P*)x;
    // A slot: the x of each rank, [ranks, rows, LOCAL].
#if DIRECT
    Exchange exchange;
    exchange.open(table, rank);
    wait_for_previous();
    exchange.begin();
    for (int i = first; i < total; i += step) {
        const P value = own[i];
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != rank) exchange.slot<P>(r, slot_units)[(size_t)rank * total + i] = value;
    }
    exchange.meet(0, RANKS);
    const P* here = exchange.slot<P>(rank, slot_units);
#else
    wait_for_previous();
    const P* here = (const P*)parts;
#endif
    for (int i = first; i < total; i += step) {
        const int row = i / PACKS, column = i % PACKS;
        P* target = (P*)(out + (size_t)row * SIZE) + column;
        for (int r = 0; r < RANKS; r++) {
            if (r * PACKS + column >= SIZE / WIDTH) continue;
            target[r * PACKS] = r == rank ? own[i] : load_arrived(here + (size_t)r * total + i);
        }
    }
#if DIRECT
    exchange.end();
#endif
}
