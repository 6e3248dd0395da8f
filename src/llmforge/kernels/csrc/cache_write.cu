// New keys and values into linear caches, all caches at once: new [B, HEADS, S, SIZE] goes into cache
// [rows, HEADS, CAPACITY, SIZE], token s of row b to position past_lens[b] + s of the cache's row
// first_row + b. What would come behind a row's end is dropped.
//   WIDTH: elements a load. THREADS: block size. Grid: blocks of a row's packs, B, caches.
// table [caches]: the addresses of a cache and of what goes into it.
#include "common.cuh"

struct Entry {
    T* cache;
    const T* added;
};

#define PACKS (SIZE / WIDTH)

extern "C" __global__ void __launch_bounds__(THREADS)
cache_write(const Entry* table, const int* past_lens, int first_row, int tokens) {
    let_next_start();
    wait_for_previous();
    const Entry entry = table[blockIdx.z];
    const int row = blockIdx.y, past = past_lens[row];
    const int total = HEADS * tokens * PACKS;
    const Pack<WIDTH>* source = (const Pack<WIDTH>*)entry.added + (size_t)row * total;
    Pack<WIDTH>* target =
        (Pack<WIDTH>*)entry.cache + (size_t)(first_row + row) * HEADS * CAPACITY * PACKS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < total; i += gridDim.x * THREADS) {
        const int pack = i % PACKS, token = i / PACKS % tokens, head = i / PACKS / tokens;
        const int position = past + token;
        if (position < CAPACITY) target[((size_t)head * CAPACITY + position) * PACKS + pack] = source[i];
    }
}
