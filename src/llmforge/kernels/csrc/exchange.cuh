// Memory that ranks write into for each other. A rank's region (kernels/exchange.py allocates it and
// gives its address to the others) is what its tensor-parallel group shares, then its mailbox.
//
// A kernel that joins ranks is one *exchange*. Data go to one of two slots in turn. Nobody overwrites
// what another still reads: who is in exchange n has finished n - 1, so all others have begun n - 1,
// so they have finished n - 2, which used the same slot. (An exchange begins when all kernels before
// it in its rank's stream are complete.) All ranks make the same exchanges with the same grids, and
// block b of a rank waits for the blocks b of the others alone.
#pragma once

#define MAX_RANKS 8
#define MAX_BLOCKS 64
#define HEADER_BYTES 8192
// Ranks of one step are apart by what the host's work takes: a rank this late has failed.
#define PATIENCE_NS 120000000000ull

// The start of what a tensor-parallel group shares; two slots follow.
struct Group {
    u32 exchanges;  // that this rank has finished
    u32 finished;   // blocks of the present one
    u32 unused[62];
    u32 arrived[2][MAX_BLOCKS][MAX_RANKS];  // the exchange that a block of each rank is in, plus 1
};

// The start of a mailbox; two slots follow. Each rank is sent to by at most one other.
struct Mailbox {
    u32 sent, sending;        // messages that this rank has sent; blocks done with the present one
    u32 received, receiving;  // the same of messages to it
    u32 unused[60];
    u32 taken;  // messages from this rank that the receiver has read
    u32 unused2[63];
    u32 arrived[MAX_BLOCKS];  // the last message to this rank that block b has written, plus 1
};

// Returns when another rank has brought the flag to `wanted` or beyond it. Traps, which ends the
// process, where that takes longer than any rank that is alive.
DEVICE void wait_for(const u32* flag, u32 wanted) {
    u64 start = 0;
    for (u32 tries = 1; (int)(load_acquire(flag) - wanted) < 0; tries++) {
        if (tries % 4096) continue;
        const u64 now = nanoseconds();
        if (start == 0) start = now;
        if (now - start > PATIENCE_NS) __trap();
    }
}

DEVICE char* slot_of(u64 region, u32 number, int slot_units) {
    return (char*)region + HEADER_BYTES + (size_t)(number % 2) * slot_units * 16;
}

// What another rank wrote, from where it arrives (never from a cache that does not see that).
DEVICE Pack<WIDTH> load_arrived(const Pack<WIDTH>* address) {
    Pack<WIDTH> value;
    if constexpr (sizeof(value) == 16) {
        *(uint4*)&value = __ldcg((const uint4*)address);
    } else if constexpr (sizeof(value) == 4) {
        *(u32*)&value = __ldcg((const u32*)address);
    } else {
        *(unsigned short*)&value = __ldcg((const unsigned short*)address);
    }
    return value;
}

// The group's regions, and this rank's part in the present exchange.
struct Exchange {
    const u64* table;  // the regions' addresses, which never change
    u64 own;
    int rank;
    u32 number;

    // Before the kernels before this one are complete.
    DEVICE void open(const u64* addresses, int self) {
        table = addresses, rank = self, own = addresses[self];
    }
    // After they are.
    DEVICE void begin() { number = *(volatile u32*)&((Group*)own)->exchanges; }
    // Where rank r is written to and reads in this exchange.
    template <typename P>
    DEVICE P* slot(int r, int slot_units) const {
        return (P*)slot_of(r == rank ? own : table[r], number, slot_units);
    }
    // What the blocks b of all ranks wrote before `meet` is there for all of them after it.
    DEVICE void meet(int phase, int ranks) const {
        __syncthreads();
        const int other = threadIdx.x;
        if (other < ranks && other != rank) {
            Group* there = (Group*)table[other];
            store_release(&there->arrived[phase][blockIdx.x][rank], number + 1);
            wait_for(&((Group*)own)->arrived[phase][blockIdx.x][other], number + 1);
        }
        __syncthreads();
    }
    DEVICE void end() const {
        __syncthreads();
        if (threadIdx.x) return;
        Group* group = (Group*)own;
        if (atomicAdd(&group->finished, 1) == gridDim.x - 1) {
            group->finished = 0;
            group->exchanges = number + 1;
        }
    }
};
