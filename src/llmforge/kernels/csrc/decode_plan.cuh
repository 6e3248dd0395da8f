// How a grid of blocks divides the keys of a step's sequences, which each block computes for itself:
// the lengths are known on the GPU only.
//
// Keys are counted in units of 16. What is divided is a row of pairs (sequence, kv head), each as
// long as its sequence has units, rounded up to a multiple of `quantum`; every block takes the next
// `share` units of the row, a multiple of `quantum` too. A quantum as long as the longest sequence
// gives every block whole pairs, a k-th of it up to k parts of a pair, and 1 gives all blocks the
// same number of units, wherever pairs end. Of those the cheapest is taken: a block takes as long as
// its share is, and joining the parts of a pair has a price.
//   WINDOW, KV_HEADS, WARPS: as the kernel has them. JOIN_COST: that price, in half units as a block
//   reads them while others read too; further parts are half a unit each. A unit takes 0.15 to 0.2 us
//   then, to write a part and be the last to join about 2.5, to join one more some 0.08.
#pragma once

#define UNIT 16
#define THREADS (WARPS * 32)
#define CANDIDATES 16
#define JOIN_COST_UNEVEN (JOIN_COST + 8)  // nearly every block has two parts

DEVICE int up(int x, int y) { return (x + y - 1) / y; }
// Units that lie wholly before the window of a sequence's last token.
DEVICE int skipped(int kv_len) { return WINDOW > 0 ? max(0, kv_len - WINDOW) / UNIT : 0; }
DEVICE int units_of(int kv_len) { return up(kv_len, UNIT) - skipped(kv_len); }

// x of all lanes, joined by `joined`.
template <class Joined>
DEVICE int over_warp(int x, Joined joined) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x = joined(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

struct Plan {
    const int* lens;    // of the sequences
    const int* starts;  // of the sequences, in rounded units of one kv head; their end behind them
    int share, first;   // units of a block; the sequence in which this block's begin
};

// A part of one pair: units [begin, end) of a kv head of a sequence, and then `rest` units of the
// block's share.
struct Run {
    int sequence, head, begin, end, rest;

    DEVICE int length(const Plan& plan) const {
        return plan.starts[sequence + 1] - plan.starts[sequence];
    }
    // The pair's place in the row.
    DEVICE int place(const Plan& plan) const {
        return plan.starts[sequence] * KV_HEADS + head * length(plan);
    }
    // From `begin` on, of `share` units what is this pair's.
    DEVICE void take(const Plan& plan, int share) {
        end = min(units_of(plan.lens[sequence]), begin + share);
        rest = share - (length(plan) - begin);
    }
    // The block's next run. False where there is none.
    DEVICE bool next(const Plan& plan, int sequences) {
        if (rest <= 0) return false;
        if (++head == KV_HEADS) head = 0, sequence++;
        if (sequence == sequences) return false;
        begin = 0;
        take(plan, rest);
        return true;
    }
};

struct Division {
    int quantum, share;
};

// The cheapest of the candidates for sequences of these lengths, the longest of `most` units.
DEVICE Division choose(const int* lens, int most, int sequences) {
    __shared__ int costs[CANDIDATES], shares[CANDIDATES];
    const int lane = threadIdx.x % 32;
    auto quantum_of = [&](int c) { return c == CANDIDATES - 1 ? 1 : up(most, c + 1); };
#pragma unroll 1
    for (int c = threadIdx.x / 32; c < CANDIDATES; c += WARPS) {
        const int quantum = quantum_of(c);
        int pieces = 0;
#pragma unroll 1
        for (int s = lane; s < sequences; s += 32) pieces += up(units_of(lens[s]), quantum);
        pieces = over_warp(pieces, [](int x, int y) { return x + y; }) * KV_HEADS;
        const int share = up(pieces, gridDim.x) * quantum, parts = up(most, share);
        const int joining = c == CANDIDATES - 1 ? JOIN_COST_UNEVEN + parts : JOIN_COST + parts;
        if (lane == 0) shares[c] = share, costs[c] = 2 * share + (c ? joining : 0);
    }
    __syncthreads();
    const int mine = lane < CANDIDATES ? costs[lane] * CANDIDATES + lane : 0x7fffffff;
    const int best = over_warp(mine, [](int x, int y) { return min(x, y); }) % CANDIDATES;
    return {quantum_of(best), shares[best]};
}

// Fills `starts`; gives the sequence in which `place` of the row is.
DEVICE int lay_out(int* starts, const int* lens, int sequences, int quantum, int place) {
    __shared__ int ends[WARPS], found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
#pragma unroll 1
    for (int base = 0; base < sequences; base += THREADS) {
        const int s = base + threadIdx.x;
        const int length = s < sequences ? up(units_of(lens[s]), quantum) * quantum : 0;
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
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) end += ends[w];
            before += ends[w];
        }
        if (s >= sequences) continue;
        starts[s] = end - length;
        if (s == sequences - 1) starts[sequences] = end;
        if ((end - length) * KV_HEADS <= place && place < end * KV_HEADS) found = s;
    }
    __syncthreads();
    return found;
}

// The division of these sequences, `lens` [sequences] and `starts` [sequences + 1] being shared memory
// to keep it in. For all threads of a block.
DEVICE Plan make_plan(int* lens, int* starts, const int* kv_lens, int sequences) {
    __shared__ int longest[WARPS];
    int most = 0;
#pragma unroll 1
    for (int s = threadIdx.x; s < sequences; s += THREADS) {
        lens[s] = __ldcg(kv_lens + s);
        most = max(most, units_of(lens[s]));
    }
    most = over_warp(most, [](int x, int y) { return max(x, y); });
    if (threadIdx.x % 32 == 0) longest[threadIdx.x / 32] = most;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) most = max(most, longest[w]);
    const Division division = choose(lens, most, sequences);
    const int place = blockIdx.x * division.share;
    const int first = lay_out(starts, lens, sequences, division.quantum, place);
    return Plan{lens, starts, division.share, first};
}

// This block's first run. False where the block has none.
DEVICE bool first_run(const Plan& plan, int sequences, Run& run) {
    const int place = blockIdx.x * plan.share;
    if (place >= plan.starts[sequences] * KV_HEADS) return false;
    run.sequence = plan.first;
    const int rest = place - plan.starts[plan.first] * KV_HEADS, length = run.length(plan);
    run.head = rest / length;
    run.begin = rest % length;
    run.take(plan, plan.share);
    return true;
}
