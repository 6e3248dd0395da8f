// A step's way from the host and back. `fetch` brings what the host has written for it, `deliver` takes
// back what it drew; both reach into the host's pinned memory themselves, since a copy engine and the
// kernels before and behind would wait for each other.
// The host has two areas, which steps use in turn: `turn` is that of the next to be fetched.
// Kernels read a step's arrays before they wait for the one before them, so nothing of the step may start
// before `fetch` has ended.
// THREADS: block size. Grid: one block.
#include "common.cuh"

#define LOADS 4  // a thread has under way

extern "C" __global__ void __launch_bounds__(THREADS)
fetch(uint4* out, const uint4* first, const uint4* second, int* turn, int packs) {
    wait_for_previous();
    const int now = *turn;
    const uint4* source = now ? second : first;
    for (int i = threadIdx.x; i < packs; i += LOADS * THREADS) {
        uint4 loaded[LOADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            if (i + l * THREADS < packs) loaded[l] = source[i + l * THREADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            if (i + l * THREADS < packs) out[i + l * THREADS] = loaded[l];
    }
    __syncthreads();  // all have seen whose turn it is
    if (threadIdx.x == 0) *turn = 1 - now;
}

// drawn, first and second: the tokens of up to `most` rows, then as many largest logits.
extern "C" __global__ void __launch_bounds__(THREADS)
deliver(int* first, int* second, const int* drawn, const int* turn, int rows, int most) {
    let_next_start();
    wait_for_previous();
    int* target = *turn ? first : second;  // the turn has passed on
    for (int i = threadIdx.x; i < rows; i += THREADS) {
        target[i] = drawn[i];
        target[most + i] = drawn[most + i];
    }
}
