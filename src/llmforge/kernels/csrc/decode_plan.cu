// The division of a decode step's keys among the blocks of decode_attention.cu (decode_plan.cuh). The
// lengths are known on the GPU only, and the same for all layers, so one block divides once a step.
//
// Candidates are quanta: one as long as the longest sequence gives every block whole pairs, a k-th of
// it up to k parts of a pair, and 1 gives all blocks the same, wherever pairs end. Of those the
// cheapest is taken: a block takes as long as its share is, each part that it has has a price, which
// with a quantum of 1 is what pairs are padded with, and so has joining the parts of a pair.
//   PAIR_COST, JOIN_COST: those prices, in half units as a warp reads them while others read too:
//   0.5 to 1 us. Further parts to join are an eighth of that each. BLOCKS: of a multiprocessor, of
//   at most MOST together. BLOCK_SIZE, TABLE_STRIDE: of the block table.
// Dynamic shared memory: 2 sequences + 1 int32. Grid: 1.
#include "common.cuh"
#include "decode_plan.cuh"

#define THREADS 512
#define CANDIDATES 16
#define PAIR (PAIR_COST * WARPS)
#define JOIN (JOIN_COST * WARPS)

// x of all lanes, joined by `joined`.
template <class Joined>
DEVICE int over_warp(int x, Joined joined) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x = joined(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Fills `lens`; gives the units of the longest.
DEVICE int fetch_lens(int* lens, const int* kv_lens, int sequences) {
    __shared__ int longest[THREADS / 32];
    int most = 0;
    for (int s = threadIdx.x; s < sequences; s += THREADS) {
        lens[s] = __ldcg(kv_lens + s);
        most = max(most, units_of(lens[s]));
    }
    most = over_warp(most, [](int x, int y) { return max(x, y); });
    if (threadIdx.x % 32 == 0) longest[threadIdx.x / 32] = most;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) most = max(most, longest[w]);
    return most;
}

// The cheapest of the candidates for sequences of these lengths, the longest of `most` units.
DEVICE Division choose(const int* lens, int most, int sequences, int blocks) {
    __shared__ int costs[CANDIDATES], shares[CANDIDATES];
    const int lane = threadIdx.x % 32, c = threadIdx.x / 32;
    auto quantum_of = [&](int c) { return c == CANDIDATES - 1 ? 1 : up(most, c + 1); };
    auto pad_of = [&](int c) { return c == CANDIDATES - 1 ? PAIR / 2 : 0; };
    if (c < CANDIDATES) {
        const bool uneven = c == CANDIDATES - 1;
        const Division division{quantum_of(c), pad_of(c), 0};
        int places = 0;
        for (int s = lane; s < sequences; s += 32) places += division.length(units_of(lens[s]));
        places = over_warp(places, [](int x, int y) { return x + y; }) * KV_HEADS;
        const int pieces = up(places / division.quantum, blocks);
        const int share = pieces * division.quantum;
        // Where parts end anywhere, nearly every block has two that others have to join.
        const int working = uneven ? PAIR + JOIN / 2 : pieces * PAIR;
        const int joining = JOIN + up(up(most, share) * WARPS, 4);
        if (lane == 0) shares[c] = share, costs[c] = 2 * share + working + (c ? joining : 0);
    }
    __syncthreads();
    const int mine = lane < CANDIDATES ? costs[lane] * CANDIDATES + lane : 0x7fffffff;
    const int best = over_warp(mine, [](int x, int y) { return min(x, y); }) % CANDIDATES;
    return {quantum_of(best), pad_of(best), shares[best]};
}

// Fills `starts`, the places of the sequences' first heads where each had but one, and their end.
DEVICE void lay_out(int* starts, const int* lens, int sequences, const Division& division) {
    __shared__ int ends[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
    for (int base = 0; base < sequences; base += THREADS) {
        const int s = base + threadIdx.x;
        const int length = s < sequences ? division.length(units_of(lens[s])) : 0;
        int end = length;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(FULL_WARP, end, offset);
            if (lane >= offset) end += other;
        }
        if (base) __syncthreads();  // `ends` has been read
        if (lane == 31) ends[warp] = end;
        __syncthreads();
        end += before;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) end += ends[w];
            before += ends[w];
        }
        if (s >= sequences) continue;
        starts[s] = end - length;
        if (s == sequences - 1) starts[sequences] = end;
    }
    __syncthreads();
}

// The sequence in which a place of the row is.
DEVICE int sequence_at(const int* starts, int sequences, int place) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (starts[middle] * KV_HEADS <= place) low = middle;
        else high = middle - 1;
    }
    return low;
}

// What a block has to know; see PLAN_INTS.
DEVICE void write_block(int* plan, int block, const int* lens, const int* starts, int sequences,
                        const Division& division, const int* block_table) {
    int* own = plan + block * PLAN_INTS;
    const int place = block * division.share;
    int s = place < starts[sequences] * KV_HEADS ? sequence_at(starts, sequences, place) : sequences;
    int head = 0, begin = 0, share = division.share;
    if (s < sequences) {
        const int units = units_of(lens[s]), length = division.length(units);
        const int offset = place - starts[s] * KV_HEADS;
        head = offset / length, begin = offset % length;
        if (begin >= units) {  // behind the pair's keys: the next
            share -= length - begin, begin = 0;
            if (++head == KV_HEADS) head = 0, s++;
        }
    }
    const bool has = s < sequences && share > 0;
    const int kv_len = has ? lens[s] : 0, units = units_of(kv_len);
    ((int4*)own)[0] = make_int4(has ? s : -1, head, begin, kv_len);
    ((int4*)own)[1] = make_int4(share, division.quantum, division.pad, division.share);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const int unit = begin + w, key = (skipped(kv_len) + unit) * UNIT;
        const int* blocks = block_table + (size_t)s * TABLE_STRIDE;
        own[8 + w] = has && unit < units ? __ldcg(blocks + key / BLOCK_SIZE) : 0;
    }
}

// plan: [blocks, PLAN_INTS]. block_table: [sequences, TABLE_STRIDE].
extern "C" __global__ void __launch_bounds__(THREADS)
decode_plan(int* plan, const int* kv_lens, const int* block_table, int sequences, int processors) {
    extern __shared__ int lens[];
    int* starts = lens + sequences;
    const int blocks = min(processors * BLOCKS, MOST);
    wait_for_previous();
    const int most = fetch_lens(lens, kv_lens, sequences);
    const Division division = choose(lens, most, sequences, blocks);
    lay_out(starts, lens, sequences, division);
    for (int b = threadIdx.x; b < blocks; b += THREADS)
        write_block(plan, b, lens, starts, sequences, division, block_table);
    // Now only: decode_attention.cu reads the plan before it waits.
    __threadfence();
    __syncthreads();
    let_next_start();
}
