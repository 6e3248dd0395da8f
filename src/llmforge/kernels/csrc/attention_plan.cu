// Lists the items of a step's attention (attention_plan.cuh), those with most tiles of keys first: the
// lengths are known on the GPU only, and the same for all layers.
//   GROUP, WINDOW, KEYS as there.
// plan: [1 + items, 4] int32: first how many there are, then sequence, token, tokens, position of each.
// Grid: 1.
#include "common.cuh"
#include "attention_plan.cuh"

#define THREADS 1024
#define WARPS (THREADS / 32)

// A place in the list for this item: among those with as many tiles, and behind those with more. (Of
// more tiles than there are places for, the order does not matter.)
DEVICE int rank_of(const Item& item) {
    return THREADS - 1 - min(item.end() - item.begin(), THREADS - 1);
}

// Calls `each` with all items, a warp a sequence.
template <class Each>
DEVICE void each_item(const int* query_starts, const int* kv_lens, int sequences, Each each) {
    for (int s = threadIdx.x / 32; s < sequences; s += WARPS) {
        const int start = __ldcg(query_starts + s), count = __ldcg(query_starts + s + 1) - start;
        const Item all(s, start, count, __ldcg(kv_lens + s) - count);
        for (int first = threadIdx.x % 32 * ITEM_TOKENS; first < count; first += 32 * ITEM_TOKENS)
            each(all.from(first, ITEM_TOKENS));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_plan(int4* plan, const int* query_starts, const int* kv_lens, int sequences) {
    __shared__ int places[THREADS], ends[WARPS];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    places[threadIdx.x] = 0;
    wait_for_previous();
    __syncthreads();
    each_item(query_starts, kv_lens, sequences,
              [&](const Item& item) { atomicAdd(places + rank_of(item), 1); });
    __syncthreads();
    // From how many there are of each rank to where the first of them is.
    const int own = places[threadIdx.x];
    int end = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(FULL_WARP, end, offset);
        if (lane >= offset) end += other;
    }
    if (lane == 31) ends[warp] = end;
    __syncthreads();
    for (int w = 0; w < warp; w++) end += ends[w];
    places[threadIdx.x] = end - own;
    if (threadIdx.x == THREADS - 1) plan[0] = make_int4(end, 0, 0, 0);
    __syncthreads();
    each_item(query_starts, kv_lens, sequences, [&](const Item& item) {
        plan[1 + atomicAdd(places + rank_of(item), 1)] =
            make_int4(item.sequence, item.token, item.tokens, item.position);
    });
}
