// x of the group's first rank, on all of them: `count` elements, which are moved and nothing else.
// DIRECT and RANKS as in all_reduce.cu. THREADS: block size. Grid: one block.
#include "common.cuh"
#define WIDTH 1
#include "exchange.cuh"

typedef Pack<WIDTH> P;

extern "C" __global__ void __launch_bounds__(THREADS)
broadcast(T* x, const u64* table, const T* parts, int rank, int count, int slot_units) {
    let_next_start();
    P* own = (P*)x;
#if DIRECT
    Exchange exchange;
    exchange.open(table, rank);
    wait_for_previous();
    exchange.begin();
    if (rank == 0)
        for (int i = threadIdx.x; i < count; i += THREADS) {
            const P value = own[i];
#pragma unroll
            for (int r = 1; r < RANKS; r++) exchange.slot<P>(r, slot_units)[i] = value;
        }
    exchange.meet(0, RANKS);
    const P* there = exchange.slot<P>(rank, slot_units);
#else
    wait_for_previous();
    const P* there = (const P*)parts;
#endif
    if (rank)
        for (int i = threadIdx.x; i < count; i += THREADS) own[i] = load_arrived(there + i);
#if DIRECT
    exchange.end();
#endif
}
