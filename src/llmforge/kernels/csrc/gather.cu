// Rows of a matrix by index: the embedding lookup (ids with an offset; rows that are not held give
// zeros) and the selection of the rows whose next token is wanted.
// HIDDEN: elements of a row. WIDTH: elements a load. THREADS: block size. Grid: one block a row.
// DRAWN: an id below zero, ~i, stands for drawn[i], which the step before left there; the id takes its
// place, for what draws the next tokens.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
gather(T* out, const T* table, int* ids, const int* drawn, int table_rows, int first) {
    let_next_start();
    wait_for_previous();
    int id = ids[blockIdx.x];
#if DRAWN
    if (id < 0) {
        id = drawn[~id];
        if (threadIdx.x == 0) ids[blockIdx.x] = id;  // others may read either
    }
#endif
    const int row = id - first;
    const bool held = row >= 0 && row < table_rows;
    const Pack<WIDTH>* source = (const Pack<WIDTH>*)(table + (size_t)(held ? row : 0) * HIDDEN);
    Pack<WIDTH>* target = (Pack<WIDTH>*)(out + (size_t)blockIdx.x * HIDDEN);
    for (int i = threadIdx.x; i < HIDDEN / WIDTH; i += THREADS) {
        Pack<WIDTH> value = source[i];
        if (!held) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) value.v[j] = from_float(0.0f);
        }
        target[i] = value;
    }
}
